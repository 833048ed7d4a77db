"""The network in NumPy, and the weights that it is loaded with."""

from __future__ import annotations

import itertools
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from inferq.consumers.ner import bigru_crf
from inferq.consumers.ner.backend import Span
from inferq.consumers.ner.bigru_crf import BiGruCrf, Crf, Floats, Ids
from inferq.consumers.ner.lac import LacBackend, _installed_folder
from inferq.schemas import InstallationError
from tests.ner.gold import sentences

GOLD = [sentence.text for sentence in sentences()]

PIECES = st.one_of(
    st.sampled_from(GOLD),
    st.text(st.sampled_from("".join(GOLD)), min_size=1, max_size=80),
    st.text(min_size=1, max_size=20),
    st.text(st.characters(categories=["Cs"]), min_size=1, max_size=5),
    st.lists(st.sampled_from(GOLD), min_size=5, max_size=12).map(lambda some: "".join(some)[:512]),
)


@given(st.lists(PIECES, min_size=1, max_size=12))
@settings(max_examples=60)
def test_a_batch_gives_exactly_what_each_piece_gives_alone(lac: LacBackend, pieces: list[str]) -> None:
    assert lac.read(pieces) == [lac.read([piece])[0] for piece in pieces]


def test_a_path_that_leads_by_next_to_nothing_is_decided_alone(
    lac: LacBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given batches that are computed with an error, paths that it may have decided are computed again."""
    draw = np.random.default_rng(0)
    ids = [lac._ids("".join(draw.choice(list("".join(GOLD)), 60))) for _ in range(64)]
    exactly = BiGruCrf._emissions
    error = 0.01

    def with_an_error(self: BiGruCrf, packed: Ids, packing: bigru_crf._Packing) -> Floats:
        emissions = exactly(self, packed, packing)
        if len(packing.lengths) > 1:
            emissions += draw.uniform(-error, error, emissions.shape).astype(np.float32)
        return emissions

    alone = [lac._network.tag([one])[0].tolist() for one in ids]
    monkeypatch.setattr(BiGruCrf, "_emissions", with_an_error)
    hasty = replace(lac._network, close_call=0.0)
    assert [path.tolist() for path in hasty.tag(ids)] != alone  # the error is one that shows
    # Two paths of 60 steps come nearer to each other by this much at most.
    careful = replace(lac._network, close_call=2 * 60 * error)
    assert [path.tolist() for path in careful.tag(ids)] == alone


def test_rounding_is_far_below_what_counts_as_a_close_call(lac: LacBackend) -> None:
    ids = sorted((lac._ids(text) for text in [*GOLD, "".join(GOLD)[:512]]), key=len, reverse=True)
    packing = bigru_crf._Packing([len(one) for one in ids])
    together = lac._network._emissions(packing.pack(ids), packing)
    for number, one in enumerate(ids):
        alone = bigru_crf._Packing([len(one)])
        rows = np.asarray(packing.starts)[: len(one)] + number
        difference = np.abs(together[rows] - lac._network._emissions(alone.pack([one]), alone))
        assert difference.max() < lac._network.close_call / 50


@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4).map(lambda all_: sorted(all_, reverse=True)),
    seed=st.integers(0, 2**32 - 1),
)
def test_viterbi_finds_the_best_path_and_its_lead(lengths: list[int], seed: int) -> None:
    """Against every path there is."""
    draw = np.random.default_rng(seed)
    crf = Crf(*(draw.normal(size=shape).astype(np.float32) for shape in ((3,), (3,), (3, 3))))
    packing = bigru_crf._Packing(lengths)
    emissions = draw.normal(size=(sum(lengths), 3)).astype(np.float32)
    paths, leads = bigru_crf._best_paths(emissions, crf, packing)
    for number, length in enumerate(lengths):
        rows = emissions[np.asarray(packing.starts)[:length] + number]

        def worth(path: tuple[int, ...], rows: Floats = rows) -> float:
            moves = sum(float(crf.moves[a, b]) for a, b in itertools.pairwise(path))
            here = sum(float(row[tag]) for row, tag in zip(rows, path, strict=True))
            return float(crf.begin[path[0]] + crf.end[path[-1]]) + moves + here

        ranked = sorted(itertools.product(range(3), repeat=length), key=worth, reverse=True)
        assert tuple(paths[number]) == ranked[0] or leads[number] < 1e-4
        assert leads[number] == pytest.approx(worth(ranked[0]) - worth(ranked[1]), abs=1e-4)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_packing_is_undone_by_unpacking(lengths: list[int]) -> None:
    lengths.sort(reverse=True)
    sequences = [np.arange(length) + 100 * number for number, length in enumerate(lengths)]
    packing = bigru_crf._Packing(lengths)
    packed = packing.pack(sequences)
    for given_, back in zip(sequences, packing.unpack(packed), strict=True):
        assert given_.tolist() == back.tolist()
    for given_, back in zip(sequences, packing.unpack(packed[packing.reversal]), strict=True):
        assert given_[::-1].tolist() == back.tolist()


def test_what_jiebas_own_example_says(lac: LacBackend) -> None:
    """The words of LAC's documentation, with its tags."""
    assert lac.read(["三亚是一个美丽的城市"])[0] == [Span(0, 2, "LOC", "LOC")]
    assert lac.read(["LAC是个优秀的分词工具"])[0] == [Span(0, 3, "MISC", "nz")]
    assert lac.read(["《红楼梦》的作者"])[0] == [Span(1, 4, "WORK", "nw")]


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("李娜（清华大学教授）来了！", "李娜(清华大学教授)来了!"),
        ("２０１９年９月１０日：默克尔。", "2019年9月10日:默克尔."),
        ("张伟、李娜和“ＴＯＭ”", '张伟,李娜和"tom"'),
        ("NBA的姚明", "nba的姚明"),
    ],
)
def test_width_and_case_make_no_difference(lac: LacBackend, wide: str, narrow: str) -> None:
    assert len(wide) == len(narrow)
    assert lac.read([wide]) == lac.read([narrow])


def test_full_stops_do_not_cling_to_names(lac: LacBackend) -> None:
    spans = lac.read(["国务院总理李克强15日下午会见了德国总理默克尔。"])[0]
    assert spans[-1] == Span(20, 23, "PER", "PER")


def test_no_warning_is_given_for_long_and_odd_input(lac: LacBackend) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lac.read(["甲" * 512, "😀", "\udc00\ud800", "\0"])


def test_products_are_computed_on_one_thread(lac: LacBackend) -> None:
    # Other engines' packages may have brought a BLAS of their own along.
    assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}


def test_weights_that_are_not_the_known_ones_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "lac_small"
    shutil.copytree(_installed_folder(), folder)
    assert LacBackend(folder).info.model == "lac_small"
    weights = folder / "model_baseline" / "gru_1.w_0"
    content = bytearray(weights.read_bytes())
    content[5000] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InstallationError, match=r"22 files .* are not those of jieba 0\.42\.1") as caught:
        LacBackend(folder)
    assert caught.value.code == "bad_model_dir"
    with pytest.raises(InstallationError, match="0 files"):
        LacBackend(tmp_path / "nothing")


def test_a_missing_jieba_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferq.consumers.ner.lac.find_spec", lambda name: None)
    with pytest.raises(InstallationError, match=r"pip install 'inferq\[ner\]'") as caught:
        LacBackend()
    assert caught.value.code == "engine_not_installed"


def test_jieba_itself_is_never_imported(lac: LacBackend) -> None:
    assert lac.info.model == "lac_small"
    assert "jieba" not in sys.modules
