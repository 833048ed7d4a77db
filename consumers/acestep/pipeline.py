"""The ACE-Step model, through diffusers.AceStepPipeline.

https://huggingface.co/docs/diffusers/api/pipelines/ace_step
"""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inferq.consumers.acestep import AceStepTask
from inferq.consumers.acestep.backend import CHANNELS, SAMPLE_RATE, Audio, frames_of
from inferq.engine import Context, Precision, TaskAborted, limit_torch_memory
from inferq.schemas import EngineInfo, InstallationError, TransientFailure

_TURBO_STEPS, _STEPS = 8, 50
_GUIDANCE = 7.0
_MOST_TOKENS = 8192
"""The pipeline silently truncates longer texts. The limits of a task keep its texts shorter than this."""
_BLOCK = 1 << 20
"""Frames per yielded block."""
_DENOISED = 0.9
"""The progress of a run after its last denoising step; decoding is the rest."""

_BATCH = 8
_BATCH_SECONDS = 600
"""The most seconds of music in a batch: no more than in the longest piece, so that memory suffices for both."""

DTYPES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The name in torch of each precision that the pipeline has."""


def offered(device: str) -> list[Precision]:
    """The precisions that the pipeline has on `device`, its own choice first."""
    # diffusers warns of fp16 on a CPU: torch does not have all of its operations.
    return ["fp32", "bf16"] if device == "cpu" else ["bf16", "fp16", "fp32"]


class DiffusersBackend:
    """ACE-Step with its weights loaded."""

    ai = True

    def __init__(
        self,
        *,
        model_dir: Path | None,
        device: str,
        precision: Precision,
        cpu_offload: bool,
        gpu_memory_fraction: float | None = None,
    ) -> None:
        """Loads the weights in `model_dir` onto `device` (`cpu`, `gpu`, `cuda`, `cuda:N`).

        `precision` is one of `offered(device)`, `gpu_memory_fraction` the most of the GPU's memory that torch may
        allocate. Raises InstallationError if the packages, the weights or the device is missing.
        """
        folder = _check_folder(model_dir)
        self._torch, pipeline = _import()
        place = _check_device(self._torch, device)
        if cpu_offload and place == "cpu":
            raise InstallationError(
                "INFERQ_ACESTEP_CPU_OFFLOAD needs a GPU: set INFERQ_DEVICE to one, or turn the offload off",
                code="bad_settings",
            )
        limit_torch_memory(self._torch, place, gpu_memory_fraction)
        numbers = DTYPES[precision]
        self._pipeline = _load(pipeline, folder, getattr(self._torch, numbers))
        if cpu_offload:
            self._pipeline.enable_model_cpu_offload(gpu_id=int(place.partition(":")[2]))
        else:
            self._pipeline.to(place)
        if self._pipeline.sample_rate != SAMPLE_RATE:
            raise InstallationError(
                f"the weights in {folder} generate audio at {self._pipeline.sample_rate} Hz, not {SAMPLE_RATE}",
                code="bad_model_dir",
            )
        # Decoding ten minutes at once takes more memory than the model; tiles of 20 s take less. The pieces of a batch
        # are decoded one after another.
        self._pipeline.vae.enable_tiling()
        self._pipeline.vae.enable_slicing()
        _mask_padding(self._pipeline)
        self._pipeline.set_progress_bar_config(disable=True)
        # At full size, a CPU takes 89 s for 10 s of music: in a batch, each piece would only wait for all of them.
        self.batch_size = 1 if place == "cpu" else _BATCH
        self.info = EngineInfo(
            name="diffusers",
            version=version("diffusers"),
            model=folder.name,
            device=f"{place} ({numbers}{', offloaded' if cpu_offload else ''})",
            precision=precision,
        )

    def batch_key(self, task: AceStepTask) -> Hashable:
        """Pieces of one duration, steps and guidance go together; a long piece goes alone."""
        if _BATCH * task.duration > _BATCH_SECONDS:
            return task.tenant, task.task_id
        return task.duration, *self._parameters(task)

    def compose(
        self, tasks: Sequence[AceStepTask], seeds: Sequence[int], contexts: Sequence[Context]
    ) -> list[Iterator[Audio]]:
        """The model's music for tasks of one `batch_key`, cut to the exact number of frames.

        Each seed's noise is drawn on the CPU, so that it is the same on every device.
        """
        steps, guidance = self._parameters(tasks[0])
        _check_abort(contexts)
        for context in contexts:
            context.progress(0.0, "reading the prompt")

        def after_step(_: Any, step: int, __: float, ___: dict[str, Any]) -> dict[str, Any]:
            for context in contexts:
                context.progress(_DENOISED * (step + 1) / steps, f"step {step + 1} of {steps}")
            # The pipeline's own flag, `_interrupt`, would still decode the unfinished result.
            _check_abort(contexts)
            return {}

        try:
            made = self._pipeline(
                prompt=[task.prompt for task in tasks],
                lyrics=[task.lyrics or "" for task in tasks],
                audio_duration=tasks[0].duration,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[self._torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                callback_on_step_end=after_step,
                max_text_length=_MOST_TOKENS,
                max_lyric_length=_MOST_TOKENS,
                output_type="np",
            ).audios
        finally:
            # After an abort, the pipeline does not free its hooks itself; freeing them twice is harmless.
            self._pipeline.maybe_free_model_hooks()
        frames = frames_of(tasks[0].duration)
        return [_blocks(piece[:, :frames]) for piece in _check_audio(made, len(tasks), frames)]

    def _parameters(self, task: AceStepTask) -> tuple[int, float]:
        """The steps, and the guidance scale."""
        turbo = self._pipeline.is_turbo
        steps = task.options.steps or (_TURBO_STEPS if turbo else _STEPS)
        # Turbo weights have guidance distilled into them; the pipeline warns about any other value.
        return steps, 1.0 if turbo else task.options.guidance or _GUIDANCE


def _check_abort(contexts: Sequence[Context]) -> None:
    """Raises TaskAborted if all runs should stop. The music of a run that stops alone is made and thrown away."""
    if all(context.should_abort() for context in contexts):
        raise TaskAborted


def _mask_padding(pipeline: Any) -> None:
    """Hide the padding of a batch's shorter texts from the transformer, whose music would depend on it.

    The pipeline pads the texts of a batch to the longest one and gives its transformer no mask. The text encoder
    has none either, but it reads from left to right: padding on the right does not reach a text before it.
    """
    pipeline.tokenizer.padding_side = "right"
    mask: Any = None

    def keep_mask(_: Any, __: Any, encoded: tuple[Any, Any]) -> None:
        nonlocal mask
        mask = None if encoded[1].all() else encoded[1][:, None, None, :]

    def add_mask(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if mask is None:
            return args, kwargs
        # With guidance, the batch stands here twice: with its texts, and without.
        times = len(kwargs["hidden_states"]) // len(mask)
        return args, {**kwargs, "encoder_attention_mask": mask.repeat(times, 1, 1, 1)}

    pipeline.condition_encoder.register_forward_hook(keep_mask)
    for layer in pipeline.transformer.layers:
        layer.register_forward_pre_hook(add_mask, with_kwargs=True)


def _blocks(piece: NDArray[np.float32]) -> Iterator[Audio]:
    for begin in range(0, piece.shape[1], _BLOCK):
        yield np.ascontiguousarray(piece[:, begin : begin + _BLOCK].T)


def _check_folder(folder: Path | None) -> Path:
    """The folder. Raises InstallationError unless it holds every part that its model_index.json names."""
    advice = "it must hold ACE-Step's weights in the layout of diffusers"
    if folder is None:
        raise InstallationError(
            f"INFERQ_ACESTEP_BACKEND=diffusers needs INFERQ_ACESTEP_MODEL_DIR: {advice}", code="bad_model_dir"
        )
    index = folder / "model_index.json"
    try:
        parts = json.loads(index.read_text("utf-8"))
        missing = [
            name
            for name, library in parts.items()
            if isinstance(library, list) and library[0] and not (folder / name).is_dir()
        ]
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise InstallationError(
            f"INFERQ_ACESTEP_MODEL_DIR {folder} has no readable model_index.json ({error}): {advice}",
            code="bad_model_dir",
        ) from error
    if parts.get("_class_name") != "AceStepPipeline":
        raise InstallationError(
            f"INFERQ_ACESTEP_MODEL_DIR {folder} holds the weights of a {parts.get('_class_name')}: {advice}",
            code="bad_model_dir",
        )
    if missing:
        raise InstallationError(
            f"INFERQ_ACESTEP_MODEL_DIR {folder} is incomplete: {', '.join(missing)} is missing; {advice}",
            code="bad_model_dir",
        )
    return folder


def _import() -> tuple[Any, Any]:
    """torch and the pipeline's class."""
    # All weights are in a folder: do not ask the hub for newer ones.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import accelerate  # noqa: F401 - diffusers needs it to load large weights, and fails late without it

        return import_module("torch"), import_module("diffusers").AceStepPipeline
    except (ImportError, AttributeError, RuntimeError) as error:
        raise InstallationError(
            f"ACE-Step's packages cannot be imported ({error}): pip install 'inferq[acestep-diffusers]', or "
            "set INFERQ_ACESTEP_BACKEND=preview",
            code="engine_not_installed",
        ) from error


def _check_device(torch: Any, device: str) -> str:
    """The device's name in torch. Raises InstallationError if it is missing."""
    if device == "cpu":
        return device
    number = int(device.partition(":")[2] or 0)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= found:
        raise InstallationError(
            f"INFERQ_DEVICE={device}, but torch {torch.__version__} finds {found or 'no'} "
            f"GPU{'' if found == 1 else 's'}: install a torch built for CUDA and the driver, or set "
            "INFERQ_DEVICE=cpu",
            code="device_unavailable",
        )
    return f"cuda:{number}"


def _load(pipeline: Any, folder: Path, dtype: Any) -> Any:
    try:
        # Load safetensors only: other formats may contain code.
        return pipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InstallationError(
            f"the weights in INFERQ_ACESTEP_MODEL_DIR {folder} cannot be loaded: {error}",
            code="engine_not_loadable",
        ) from error


def _check_audio(made: Any, count: int, frames: int) -> NDArray[np.float32]:
    """The pipeline's audio, `(count, 2, n) float32` with n at least `frames`.

    Raises TransientFailure (`bad_audio`) for another shape.
    """
    audio = np.asarray(made, np.float32)
    if audio.ndim != 3 or audio.shape[:2] != (count, CHANNELS) or audio.shape[2] < frames:
        raise TransientFailure(
            f"ACE-Step returned audio of shape {audio.shape} instead of ({count}, {CHANNELS}, {frames})",
            code="bad_audio",
        )
    return audio
