"""LAC (lexical analysis of Chinese, Baidu) with the small model in jieba's package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from inferq.consumers.ner.backend import LAC_TYPES, Span
from inferq.consumers.ner.bigru_crf import BiGru, BiGruCrf, Crf, Floats, Ids
from inferq.consumers.ner.folding import FOLDS, fold
from inferq.schemas import EngineInfo, InstallationError

_SHA256 = "009d57bdbd84a46349a179cebbafcf434f84135229dbc21fa855e94a87a9f7dd"
"""Over the model's files in jieba 0.42.1, sorted by name: each file's name, a zero byte, its content."""

_UNITS = 128
_LAYERS = 2
_DIRECTIONS = 2
_BASIC_PLANE = 0x10000


class LacBackend:
    """The BiGRU-CRF `lac_small`: characters in, words with their parts of speech and names out."""

    window = 512

    def __init__(self, folder: Path | None = None) -> None:
        """Loads the model from `folder`, by default from the installed jieba.

        Raises InstallationError if the model is missing, or is not the version that is known to work.
        """
        files = _read(folder or _installed_folder())
        # The matrices are small: several threads would spend more time on waiting than on computing.
        threadpool_limits(1, user_api="blas")
        self._network = _network(files)
        self._id_of, tags = _vocabulary(files["word.dic"]), _table(files["tag.dic"])
        names = [name for _, name in sorted((number, name) for name, number in tags.items())]
        self._labels = [name.partition("-")[0] for name in names]
        # A word begins at a "-B" tag, or at an "O" tag that follows another tag.
        self._begins = np.array([name.endswith("-B") for name in names])
        self._outside = np.array([name == "O" for name in names])
        self.info = EngineInfo(
            name="lac", version=_version(), model="lac_small", device="cpu", precision="fp32"
        )

    def read(self, pieces: Sequence[str]) -> list[list[Span]]:
        """The names among the words of each piece."""
        return [self._names(tags) for tags in self._network.tag([self._ids(piece) for piece in pieces])]

    def _ids(self, piece: str) -> Ids:
        codes = np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), "<u4")
        ids: Ids = self._id_of[np.minimum(codes, _BASIC_PLANE)]
        return ids

    def _names(self, tags: Ids) -> list[Span]:
        outside = self._outside[tags]
        begins = self._begins[tags]
        begins[1:] |= outside[1:] & ~outside[:-1]
        begins[0] = True
        starts = [int(start) for start in np.flatnonzero(begins)]
        return [
            Span(start, end, LAC_TYPES[label], label)
            for start, end in zip(starts, [*starts[1:], len(tags)], strict=True)
            if (label := self._labels[int(tags[start])]) in LAC_TYPES
        ]


def _installed_folder() -> Path:
    # Locate jieba without importing it: its code is not needed, and prints deprecation warnings.
    package = find_spec("jieba")
    if package is None or not package.submodule_search_locations:
        raise InstallationError(
            "LAC's weights come with jieba, which is not installed: pip install 'inferq[ner]'",
            code="engine_not_installed",
        )
    return Path(package.submodule_search_locations[0]) / "lac_small"


def _version() -> str:
    try:
        return version("jieba")
    except PackageNotFoundError:  # only its folder is installed
        return "unknown"


def _read(folder: Path) -> dict[str, bytes]:
    """The model's files by name. Raises InstallationError if they are not those of jieba 0.42.1."""
    paths = [*folder.glob("*.dic"), *folder.glob("model_baseline/*")]
    files = {path.name: path.read_bytes() for path in sorted(paths, key=lambda path: path.name)}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(name.encode() + b"\0" + content)
    if digest.hexdigest() != _SHA256:
        raise InstallationError(
            f"the {len(files)} files of LAC's model in {folder} are not those of jieba 0.42.1: "
            "pip install --force-reinstall jieba==0.42.1",
            code="bad_model_dir",
        )
    return files


def _network(files: dict[str, bytes]) -> BiGruCrf:
    def numbers(name: str, *shape: int) -> Floats:
        # Skip Paddle's header: the checksum has verified the file already.
        size = 4 * int(np.prod(shape))
        return np.frombuffer(files[name][-size:], "<f4").reshape(shape).astype(np.float32)

    def layer(number: int) -> BiGru:
        units = [_DIRECTIONS * number + direction for direction in range(_DIRECTIONS)]
        depth = _UNITS if number == 0 else _DIRECTIONS * _UNITS
        recurrent = [numbers(f"gru_{unit}.w_0", 3 * _UNITS * _UNITS) for unit in units]
        # Paddle stores the matrix of the two gates first, then the candidate's.
        border = 2 * _UNITS * _UNITS
        return BiGru(
            inputs=np.stack([numbers(f"fc_{unit}.w_0", depth, 3 * _UNITS) for unit in units]),
            bias=np.stack(
                [
                    numbers(f"fc_{unit}.b_0", 1, 3 * _UNITS) + numbers(f"gru_{unit}.b_0", 1, 3 * _UNITS)
                    for unit in units
                ]
            ),
            gates=np.stack([weights[:border].reshape(_UNITS, 2 * _UNITS) for weights in recurrent]),
            candidate=np.stack([weights[border:].reshape(_UNITS, _UNITS) for weights in recurrent]),
        )

    tags, words = (max(_table(files[name]).values()) + 1 for name in ("tag.dic", "word.dic"))
    crf = numbers("crfw", tags + 2, tags)
    return BiGruCrf(
        embedding=numbers("word_emb", words, _UNITS),
        layers=tuple(layer(number) for number in range(_LAYERS)),
        output=numbers("fc_4.w_0", _DIRECTIONS * _UNITS, tags),
        output_bias=numbers("fc_4.b_0", tags),
        crf=Crf(begin=crf[0], end=crf[1], moves=crf[2:]),
    )


def _table(content: bytes) -> dict[str, int]:
    """A dictionary file: a number, a tab and a name on each line."""
    rows = (line.split("\t") for line in content.decode("utf-8").split("\n") if line)
    return {name: int(number) for number, name in rows}


def _vocabulary(content: bytes) -> NDArray[np.int64]:
    """Code point → row of the embedding, `(65537,)`; the last entry is for all other code points.

    The model was trained on half width and lower case: its rows for other forms still have their random
    initial values. So other forms map to the rows of the trained forms.
    """
    words = _table(content)
    rows = np.full(_BASIC_PLANE + 1, words["OOV"])
    for word, row in words.items():
        if len(word) == 1:
            rows[ord(word)] = row
    for character in (*map(chr, FOLDS), *map(chr, range(ord("A"), ord("Z") + 1))):
        rows[ord(character)] = words.get(fold(character).lower(), words["OOV"])
    return rows
