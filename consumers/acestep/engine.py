"""The music engine: a description in, audio and its waveform out, with any of the backends."""

from __future__ import annotations

import secrets
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

from inferq.consumers.acestep import AceStepOutput, AceStepTask
from inferq.consumers.acestep.audio import CONTENT_TYPES, AudioFile
from inferq.consumers.acestep.backend import CHANNELS, SAMPLE_RATE, Audio, Backend, frames_of
from inferq.consumers.acestep.settings import AceStepSettings
from inferq.consumers.acestep.waveform import Waveform
from inferq.consumers.weights.cache import model_folder
from inferq.engine import Context, Engine
from inferq.schemas import EngineInfo, InstallationError, TransientFailure


class AceStepEngine(Engine[AceStepTask]):
    """Writes the music to its file block by block, so that memory use does not grow with its length."""

    def __init__(self) -> None:
        self._settings = AceStepSettings.load()
        self._loaded: Backend | None = None

    def load(self) -> EngineInfo:
        """Load the backend that INFERQ_ACESTEP_BACKEND names."""
        self._loaded = load_backend(self._settings)
        self.batch_size = self._loaded.batch_size
        return self._loaded.info

    def warm_up(self) -> None:
        """Generate one second: libraries choose kernels and allocate memory on the first run."""
        task = AceStepTask(task_id="warm-up", task_type="acestep", prompt="a second to warm up", duration=1.0)
        nobody = Context(Path(), {}, report=lambda *_: None, abort_requested=lambda: False)
        (blocks,) = self._backend.compose([task], [0], [nobody])
        for _ in blocks:
            pass

    def batch_key(self, task: AceStepTask) -> Hashable:
        """The key of the backend."""
        return self._backend.batch_key(task)

    def run(self, task: AceStepTask, context: Context) -> AceStepOutput:
        """Generate the music, its file and its waveform picture."""
        (outcome,) = self.run_batch([task], [context])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def run_batch(
        self, tasks: Sequence[AceStepTask], contexts: Sequence[Context]
    ) -> list[AceStepOutput | Exception]:
        """Generate the music of several tasks together, then the files of one after another."""
        seeds = [task.seed if task.seed is not None else secrets.randbelow(2**32) for task in tasks]
        outcomes: list[AceStepOutput | Exception] = []
        made = self._backend.compose(tasks, seeds, contexts)
        for task, seed, context, blocks in zip(tasks, seeds, contexts, made, strict=True):
            try:
                outcomes.append(self._write(task, seed, context, blocks))
            except Exception as error:
                outcomes.append(error)
        return outcomes

    def _write(
        self, task: AceStepTask, seed: int, context: Context, blocks: Iterator[Audio]
    ) -> AceStepOutput:
        frames = frames_of(task.duration)
        suffix = task.options.format
        path = context.artifact(f"audio.{suffix}", CONTENT_TYPES[suffix])
        waveform = Waveform(frames)
        with AudioFile(path, suffix) as file:
            for block in blocks:
                context.check_abort()
                waveform.add(file.write(block))
        if file.frames != frames:
            raise TransientFailure(
                f"the backend made {file.frames} frames instead of {frames}", code="bad_audio"
            )
        waveform.draw(context.artifact("waveform.png", "image/png"))
        context.progress(1.0, "made")
        return AceStepOutput(
            duration=frames / SAMPLE_RATE,
            sample_rate=SAMPLE_RATE,
            channels=CHANNELS,
            peak_dbfs=file.peak_dbfs,
            seed=seed,
            preview=not self._backend.ai,
            ai=self._backend.ai,
        )

    def close(self) -> None:
        self._loaded = None

    @property
    def _backend(self) -> Backend:
        if self._loaded is None:
            raise RuntimeError("the music engine is not loaded: call load() first")
        return self._loaded


def load_backend(settings: AceStepSettings) -> Backend:
    """The backend that the settings name.

    Raises InstallationError if the library, the weights or the device is missing; it never falls back to
    another one.
    """
    if settings.acestep_backend == "diffusers":
        from inferq.consumers.acestep.pipeline import DTYPES, DiffusersBackend, offered

        engine = f"ACE-Step on {settings.device}"
        precision = settings.pick_precision(offered(settings.device), engine)
        if settings.acestep_dtype is not None:
            named = next(name for name, dtype in DTYPES.items() if dtype == settings.acestep_dtype)
            if settings.precision not in {None, named}:
                raise InstallationError(
                    f"INFERQ_PRECISION={settings.precision} and INFERQ_ACESTEP_DTYPE={settings.acestep_dtype} differ: "
                    "leave INFERQ_ACESTEP_DTYPE out",
                    code="bad_settings",
                )
            precision = named
        return DiffusersBackend(
            model_dir=settings.acestep_model_dir and model_folder(settings.acestep_model_dir),
            device=settings.device,
            precision=precision,
            cpu_offload=settings.acestep_cpu_offload,
            gpu_memory_fraction=settings.gpu_memory_fraction,
        )
    if settings.device != "cpu":
        raise InstallationError(
            f"INFERQ_DEVICE={settings.device}, but the preview computes on the CPU only: set "
            "INFERQ_ACESTEP_BACKEND=diffusers, or INFERQ_DEVICE=cpu for this worker",
            code="device_unavailable",
        )
    settings.pick_precision(["fp32"], "the preview")
    from inferq.consumers.acestep.preview import PreviewBackend

    return PreviewBackend()
