"""The face-swapping engine: two pictures in, one out, with any of the backends."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inferq.consumers.facefusion import FacefusionOptions, FacefusionOutput, FacefusionTask, PictureFormat
from inferq.consumers.facefusion.backend import Backend
from inferq.consumers.facefusion.settings import FacefusionSettings
from inferq.consumers.machine import gpu_fault
from inferq.consumers.media.decoder import DecodedFile, Decoder
from inferq.consumers.media.pictures import RgbImage
from inferq.consumers.weights.cache import model_folder
from inferq.engine import Context, Engine
from inferq.schemas import EngineInfo, InstallationError, InvalidTask

_FILES: dict[PictureFormat, tuple[str, str]] = {
    "png": ("output.png", "image/png"),
    "jpeg": ("output.jpg", "image/jpeg"),
    "webp": ("output.webp", "image/webp"),
}
_WEBP_SIDE = 16_383
"""The longest side that the WebP format can store, in pixels."""
_FULL_COLOUR = 90
"""From this quality on, a JPEG is written without chroma subsampling."""


class FacefusionEngine(Engine[FacefusionTask]):
    """Replaces faces on one picture with another's. Only one source and one target are in memory."""

    def __init__(self) -> None:
        settings = self._settings = FacefusionSettings.load()
        self._loaded: Backend | None = None
        self._decoder = Decoder(
            "inferq.consumers.media.pictures:SinglePicture",
            {"max_pixels": settings.facefusion_max_pixels, "setting": "INFERQ_FACEFUSION_MAX_PIXELS"},
            max_pixels=settings.facefusion_max_pixels,
        )

    def load(self) -> EngineInfo:
        """Load the backend that INFERQ_FACEFUSION_BACKEND names."""
        with self._decoder.starting():
            self._loaded = load_backend(self._settings)
        return self._loaded.info

    def warm_up(self) -> None:
        """Let the backend choose kernels and build tables."""
        self._backend.warm_up()

    def run(self, task: FacefusionTask, context: Context) -> FacefusionOutput:
        """Replace the faces that the task selects."""
        context.check_abort()
        context.progress(0.0, "reading the pictures")
        # Check both sizes before decoding either.
        self._check("source_url", context)
        self._check("target_url", context)
        source, _ = self._decode("source_url", context)
        target, profile = self._decode("target_url", context)
        with _named("target_url"):
            _check_format(task.options.format, target)
        context.check_abort()
        swap = self._backend.swap(source, target, task.options.face, context)
        context.check_abort()
        context.progress(0.95, "writing the picture")
        name, content_type = _FILES[task.options.format]
        _write(swap.picture, context.artifact(name, content_type), task.options, profile)
        context.progress(1.0, "done")
        return FacefusionOutput(
            image=name,
            width=swap.picture.shape[1],
            height=swap.picture.shape[0],
            preview=self._backend.preview,
            source_faces=swap.source_faces,
            target_faces=swap.target_faces,
            swapped=swap.swapped,
        )

    def close(self) -> None:
        self._decoder.close()
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

    @property
    def _backend(self) -> Backend:
        if self._loaded is None:
            raise RuntimeError("the face-swapping engine is not loaded: call load() first")
        return self._loaded

    def _open(self, name: str, context: Context) -> DecodedFile:
        return self._decoder.open(context.inputs[name].path, check=context.check_abort)

    def _check(self, name: str, context: Context) -> None:
        with _named(name), self._open(name, context):
            pass

    def _decode(self, name: str, context: Context) -> tuple[RgbImage, bytes | None]:
        """The pixels of an input, and its colour profile."""
        with _named(name), self._open(name, context) as file:
            return file.page(1), file.colour_profile


def load_backend(settings: FacefusionSettings) -> Backend:
    """The backend that the settings name, loaded.

    Raises InstallationError if a library, a model or the device is missing; it never falls back to another
    one.
    """
    if settings.facefusion_backend == "facefusion":
        # FaceFusion itself would start, and refuse its arguments with each task.
        if settings.gpu is not None and (fault := gpu_fault(settings.gpu)):
            raise InstallationError(
                f"INFERQ_FACEFUSION_PROVIDERS={settings.facefusion_providers}, but {fault}; add cpu to the providers, "
                "or give this worker a GPU",
                code="device_unavailable",
            )
        if settings.gpu is not None and settings.gpu_memory_fraction is not None:
            raise InstallationError(
                "INFERQ_GPU_MEMORY_FRACTION cannot limit FaceFusion, which has no such option: leave it out for this "
                "worker",
                code="bad_settings",
            )
        from inferq.consumers.facefusion.headless import HeadlessBackend, checked_home
        from inferq.consumers.facefusion.precision import pick_swapper

        home = checked_home(settings.facefusion_home)
        models = settings.facefusion_model_dir and model_folder(settings.facefusion_model_dir)
        swapper = pick_swapper(settings, models or home / ".assets" / "models")
        providers = settings.facefusion_providers.split(",")
        if settings.facefusion_resident:
            from inferq.consumers.facefusion.resident import ResidentBackend

            return ResidentBackend(
                home=home,
                python=settings.facefusion_python,
                providers=providers,
                models=models,
                swapper=swapper,
            )
        if settings.facefusion_model_dir is not None:
            raise InstallationError(
                "INFERQ_FACEFUSION_MODEL_DIR needs INFERQ_FACEFUSION_RESIDENT=true: a FaceFusion that starts for each "
                "task uses the weights in its own folder",
                code="engine_misconfigured",
            )
        return HeadlessBackend(
            home=home, python=settings.facefusion_python, providers=providers, swapper=swapper
        )
    if settings.device != "cpu":
        raise InstallationError(
            f"INFERQ_DEVICE={settings.device}, but the preview computes on the CPU only: set "
            "INFERQ_FACEFUSION_BACKEND=facefusion, or INFERQ_DEVICE=cpu for this worker",
            code="device_unavailable",
        )
    settings.pick_precision(["fp32"], "the preview")
    try:
        from inferq.consumers.facefusion.preview import PreviewBackend

        return PreviewBackend()
    except ImportError as error:
        raise _not_installed(error) from error


def _not_installed(error: ImportError) -> InstallationError:
    remedy = "pip install 'inferq[facefusion]'"
    if re.search(r"lib(GL|gthread|SM|Xext|Xrender)\b", str(error)):
        # mediapipe installs the OpenCV with windows into the same folder as the headless one.
        remedy = (
            "pip install --force-reinstall --no-deps opencv-python-headless==4.10.0.84, or "
            "apt-get install libgl1 libglib2.0-0"
        )
    return InstallationError(
        f"the preview's libraries cannot be imported ({error}): {remedy}", code="engine_not_installed"
    )


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Adds the name of the input to an InvalidTask."""
    try:
        yield
    except InvalidTask as error:
        raise InvalidTask(f"{name}: {error.message}", code=error.code) from error


def _check_format(chosen: PictureFormat, target: RgbImage) -> None:
    height, width = target.shape[:2]
    if chosen == "webp" and max(width, height) > _WEBP_SIDE:
        raise InvalidTask(
            f"the image has {width}×{height} pixels, but a WebP file has at most {_WEBP_SIDE} a side: scale the "
            "target down, or choose another options.format",
            code="image_too_large",
        )


def _write(picture: RgbImage, path: Path, options: FacefusionOptions, profile: bytes | None) -> None:
    how: dict[str, Any] = {"compress_level": 3}
    if options.format != "png":
        how = {"quality": options.quality}
    if options.format == "jpeg" and options.quality >= _FULL_COLOUR:
        how["subsampling"] = 0
    Image.fromarray(np.ascontiguousarray(picture)).save(
        path, format=options.format.upper(), icc_profile=profile, **how
    )
