"""PaddleNLP's Taskflow, in its modes fast (LAC) and accurate (WordTag)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from inferq.consumers.ner.backend import LAC_TYPES, Span
from inferq.engine import limit_paddle_memory
from inferq.schemas import EngineInfo, InstallationError

_WORDTAG_TYPES = {
    "人物类": "PER",
    "组织机构类": "ORG",
    "世界地区类": "LOC",
    "场所类": "LOC",
    "时间类": "TIME",
    "作品类": "WORK",
    "疾病损伤类": "DISEASE",
    "药物类": "DRUG",
    "品牌名": "BRAND",
    "事件类": "EVENT",
}
"""Beginning of a WordTag label → type."""

_GENERAL = "概念"
"""The ending of the labels of general terms: a doctor, a city, a novel."""

_NO_NAMES = (
    "w", "介词", "助词", "代词", "连词", "副词", "疑问词", "肯定词", "否定词", "数量词", "叹词", "拟声词",
    "修饰词", "外语单词", "英语单词", "汉语拼音", "词汇用语", "场景事件", "个性特征", "感官特征", "信息资料",
    "位置方位",
)  # fmt: skip
"""The beginnings of the labels of words that are not names."""

_MODELS = {"fast": "lac", "accurate": "wordtag"}


class TaskflowBackend:
    """`Taskflow("ner")`. It gives words with labels, without scores."""

    window = 500
    """The models take 512 tokens, of which up to three are special tokens. They truncate longer pieces."""

    def __init__(
        self,
        *,
        mode: Literal["fast", "accurate"],
        device: str,
        batch_size: int,
        threads: int,
        model_dir: Path | None,
        gpu_memory_fraction: float | None = None,
    ) -> None:
        """Loads the model of `mode` onto `device`, from `model_dir` or PaddleNLP's cache.

        `device` is `cpu`, `gpu`, `cuda` or `cuda:N`, `gpu_memory_fraction` the most of the GPU's memory that paddle
        may allocate. Raises InstallationError if a library, the weights or
        the device is missing.
        """
        number = -1 if device == "cpu" else int(device.partition(":")[2] or 0)
        limit_paddle_memory(None if number < 0 else number, gpu_memory_fraction)
        _check_device(number)
        self._mode = mode
        parameters: dict[str, Any] = {
            "mode": mode,
            "device_id": number,
            "batch_size": batch_size,
            "num_threads": threads,
        }
        if model_dir is not None:
            parameters["task_path"] = str(model_dir)
        self._flow = _load(parameters)
        self.info = EngineInfo(
            name="paddlenlp",
            version=_version(),
            model=_MODELS[mode],
            device="cpu" if number < 0 else f"gpu:{number}",
            precision="fp32",
        )

    def read(self, pieces: Sequence[str]) -> list[list[Span]]:
        """The names among the words of each piece."""
        words = self._flow(list(pieces))
        if len(pieces) == 1:  # for one piece, Taskflow gives no list around its words
            words = [words]
        return [self._names(piece, labelled) for piece, labelled in zip(pieces, words, strict=True)]

    def _names(self, piece: str, labelled: Sequence[tuple[str, str]]) -> list[Span]:
        spans = []
        start = 0
        for word, label in labelled:
            if not piece.startswith(word, start):
                raise RuntimeError(f"Taskflow's word {word!r} is not at offset {start} of {piece!r}")
            end = start + len(word)
            kind = LAC_TYPES.get(label) if self._mode == "fast" else _wordtag_type(label)
            if kind is not None:
                spans.append(Span(start, end, kind, label))
            start = end
        return spans


def _wordtag_type(label: str) -> str | None:
    """The type of a WordTag label: ours, or the label's own group. None for words that are not names."""
    group = label.partition("_")[0]
    if group in _NO_NAMES or label.endswith(_GENERAL):
        return None
    return _WORDTAG_TYPES.get(group, group)


def _version() -> str:
    try:
        return version("paddlenlp")
    except PackageNotFoundError:
        return "unknown"


def _check_device(number: int) -> None:
    """Raises InstallationError if paddlepaddle or the GPU is missing, before Taskflow can fall back."""
    try:
        paddle = import_module("paddle")
    except ImportError as error:
        raise InstallationError(
            f"paddlepaddle cannot be imported ({error}): install paddlepaddle or paddlepaddle-gpu, or set "
            "INFERQ_NER_BACKEND=lac",
            code="engine_not_installed",
        ) from error
    if number >= 0 and not (
        paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > number
    ):
        raise InstallationError(
            f"NER is set to run on gpu:{number}, but paddlepaddle {paddle.__version__} finds no such GPU: "
            "install paddlepaddle-gpu and the driver, or set INFERQ_NER_DEVICE=cpu",
            code="device_unavailable",
        )


def _load(parameters: dict[str, Any]) -> Any:
    try:
        from paddlenlp import Taskflow
    except ImportError as error:
        raise InstallationError(
            f"PaddleNLP cannot be imported ({error}): pip install 'inferq[paddlenlp]', or set "
            "INFERQ_NER_BACKEND=lac",
            code="engine_not_installed",
        ) from error
    try:
        return Taskflow("ner", **parameters)
    except Exception as error:
        raise InstallationError(
            f"PaddleNLP's model cannot be loaded: {type(error).__name__}: {error}; set INFERQ_NER_MODEL_DIR "
            "to a folder that holds the model (PaddleNLP 2.8 works with paddlepaddle 2.6, not with 3)",
            code="engine_not_loadable",
        ) from error
