"""A bidirectional GRU with a CRF on top, in NumPy: the network of Baidu's LAC.

Jiao, Sun, Sun: Chinese Lexical Analysis with Deep Bi-GRU-CRF Network, arXiv:1807.01882. Sequences of
different lengths are packed: sorted by length, time step by time step, with no padding in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_HALF = np.float32(0.5)


@dataclass(frozen=True)
class BiGru:
    """One layer, both directions: stacked as `(2, …)`, forwards first.

    `inputs` is `(2, d, 3h)`, `bias` `(2, 1, 3h)`, for the update gate, the reset gate and the candidate;
    `gates` is `(2, h, 2h)`, `candidate` `(2, h, h)`.
    """

    inputs: Floats
    bias: Floats
    gates: Floats
    candidate: Floats


@dataclass(frozen=True)
class Crf:
    """Scores of the tags: `begin` and `end` `(k,)`, `moves` `(k, k)` from row to column."""

    begin: Floats
    end: Floats
    moves: Floats


@dataclass(frozen=True)
class BiGruCrf:
    """The network: `embedding` is `(n, d)`, `output` `(2h, k)`, `output_bias` `(k,)`.

    `close_call`: up to this lead over the second best path, rounding may decide which path wins. In another
    batch, a path's score differs by less than a hundredth of this.
    """

    embedding: Floats
    layers: tuple[BiGru, ...]
    output: Floats
    output_bias: Floats
    crf: Crf
    close_call: float = 0.002

    def tag(self, sequences: Sequence[Ids]) -> list[Ids]:
        """The best tags of each sequence of ids, computed together. No sequence may be empty.

        The tags equal those of each sequence alone. A matrix product of another shape may round its last
        bit differently. So a path with a lead of at most `close_call` is computed again, alone.
        """
        order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
        packing = _Packing([len(sequences[index]) for index in order])
        emissions = self._emissions(packing.pack([sequences[index] for index in order]), packing)
        paths, leads = _best_paths(emissions, self.crf, packing)
        result: list[Ids] = [np.empty(0, np.int64)] * len(sequences)
        for index, path, lead in zip(order, paths, leads, strict=True):
            alone = len(sequences) == 1
            result[index] = path if alone or lead > self.close_call else self.tag([sequences[index]])[0]
        return result

    def _emissions(self, ids: Ids, packing: _Packing) -> Floats:
        """The scores `(n, k)` of each tag at each position, packed."""
        states = self.embedding[ids]
        for layer in self.layers:
            states = _run(layer, states, packing)
        scores: Floats = states @ self.output + self.output_bias
        return scores


class _Packing:
    """The positions of packed items: step `t` has the `active[t]` items from `starts[t]` on."""

    def __init__(self, lengths: Sequence[int]) -> None:
        """`lengths` must not increase from one to the next."""
        self.lengths = np.asarray(lengths)
        steps = np.arange(lengths[0])
        present = steps[:, None] < self.lengths
        self.active = [int(count) for count in present.sum(axis=1)]
        self.starts = [0, *(int(sum_) for sum_ in np.cumsum(self.active))]
        step, sequence = np.nonzero(present)
        backwards = self.lengths[sequence] - 1 - step
        self.reversal = np.asarray(self.starts)[backwards] + sequence
        """The index of each position's item when every sequence is reversed. It is its own inverse."""
        self._step, self._sequence = step, sequence

    def pack(self, sequences: Sequence[Ids]) -> Ids:
        ends = np.cumsum(self.lengths)
        flat: Ids = np.concatenate(sequences)[(ends - self.lengths)[self._sequence] + self._step]
        return flat

    def unpack(self, packed: Ids) -> list[Ids]:
        starts = np.asarray(self.starts)
        return [packed[starts[:length] + index] for index, length in enumerate(self.lengths)]


def _run(layer: BiGru, states: Floats, packing: _Packing) -> Floats:
    """The layer's states `(n, 2h)` for states `(n, d)`, packed.

    Cho et al., arXiv:1406.1078, in Paddle's variant: a gate `u` near 1 takes the new candidate, not the old
    state.
    """
    projected = np.matmul(states, layer.inputs) + layer.bias
    projected[1] = projected[1][packing.reversal]
    size = layer.candidate.shape[1]
    state = np.zeros((2, packing.active[0], size), np.float32)
    out = np.empty((2, len(states), size), np.float32)
    for start, count in zip(packing.starts, packing.active, strict=False):
        here = projected[:, start : start + count]
        old = state[:, :count]
        gates = _sigmoid(np.matmul(old, layer.gates) + here[:, :, : 2 * size])
        update, reset = gates[:, :, :size], gates[:, :, size:]
        candidate = np.matmul(reset * old, layer.candidate)
        candidate += here[:, :, 2 * size :]
        np.tanh(candidate, out=candidate)
        state = old + update * (candidate - old)
        out[:, start : start + count] = state
    joined: Floats = np.concatenate([out[0], out[1][packing.reversal]], axis=1)
    return joined


def _sigmoid(x: Floats) -> Floats:
    """Computes in place, with tanh, which does not overflow."""
    x *= _HALF
    np.tanh(x, out=x)
    x *= _HALF
    x += _HALF
    return x


def _best_paths(emissions: Floats, crf: Crf, packing: _Packing) -> tuple[list[Ids], list[float]]:
    """Viterbi's best path of each sequence, and a lower bound of its lead over the second best path.

    The second best path leaves the best one at some step. So it trails by at least the smallest lead over an
    alternative along the best path.
    """
    best = np.empty_like(emissions)
    best[: packing.active[0]] = emissions[: packing.active[0]] + crf.begin
    for before, start, count in zip(packing.starts, packing.starts[1:], packing.active[1:], strict=False):
        arriving = best[before : before + count, :, None] + crf.moves
        now = arriving.max(axis=1) + emissions[start : start + count]
        # Only differences matter, and float32 is more precise near zero.
        best[start : start + count] = now - now.max(axis=1, keepdims=True)
    paths = np.empty(len(emissions), np.int64)
    leads = np.full(packing.active[0], np.inf, np.float32)
    tags = np.empty(0, np.int64)
    onwards = crf.moves.T
    for start, count in zip(reversed(packing.starts[:-1]), reversed(packing.active), strict=True):
        candidates = best[start : start + count].copy()
        candidates[: len(tags)] += onwards[tags]
        candidates[len(tags) :] += crf.end
        tags = candidates.argmax(axis=1)
        rows = np.arange(count)
        top = candidates[rows, tags]
        candidates[rows, tags] = -np.inf
        np.minimum(leads[:count], top - candidates.max(axis=1), out=leads[:count])
        paths[start : start + count] = tags
    return packing.unpack(paths), [float(lead) for lead in leads]
