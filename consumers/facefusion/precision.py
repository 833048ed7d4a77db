"""FaceFusion's face swappers by precision: a precision is that of a file of weights."""

from __future__ import annotations

from pathlib import Path

from inferq.consumers.facefusion.settings import FacefusionSettings
from inferq.engine import InstallationError, Precision
from inferq.schemas import expand_home

SWAPPERS: dict[str, Precision] = {
    "hyperswap_1a_256": "fp16",  # FaceFusion's own choice
    "inswapper_128_fp16": "fp16",
    "inswapper_128": "fp32",
}
"""FaceFusion's names of face swappers, and the precision of each one's weights."""


def pick_swapper(settings: FacefusionSettings, models: Path) -> str | None:
    """The face swapper that has INFERQ_PRECISION and whose weights are in `models`; None if none is wanted.

    FaceFusion then uses the one of its own configuration. Raises InstallationError if there is none.
    """
    if settings.precision is None:
        return None
    models = expand_home("INFERQ_FACEFUSION_MODEL_DIR", models)
    present = {name: precision for name, precision in SWAPPERS.items() if (models / f"{name}.onnx").is_file()}
    if not present:
        raise InstallationError(
            f"INFERQ_PRECISION={settings.precision} needs the weights of {', '.join(SWAPPERS)} in {models}, and "
            "none is there: run FaceFusion's force-download, or leave INFERQ_PRECISION out",
            code="engine_not_installed",
        )
    precision = settings.pick_precision(list(dict.fromkeys(present.values())), f"FaceFusion with {models}")
    return next(name for name, has in present.items() if has == precision)
