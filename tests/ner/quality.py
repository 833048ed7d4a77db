"""Prints how well the default backend finds the entities of gold.txt: `python -m tests.ner.quality`.

With `--faults` each sentence that was not read right is shown, too; with `--speed` how long loading takes,
how much memory the process then has, and how many of the sentences it reads in a second of
processor time. The settings apply (INFERQ_NER_BACKEND=…).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from inferq.consumers.engine import Context
from inferq.consumers.ner import NerOutput, NerTask
from inferq.consumers.ner.engine import NerEngine
from tests.ner.gold import TYPES, Score, score, sentences


def read(engine: NerEngine, texts: list[str]) -> NerOutput:
    """One task's output."""
    task = NerTask.model_validate({"task_id": "gold", "task_type": "ner", "texts": texts})
    with TemporaryDirectory() as folder:
        return engine.run(task, Context(Path(folder), {}, lambda fraction, note: None, lambda: False))


def measure(engine: NerEngine) -> Score:
    """The score of a loaded engine on all the sentences."""
    gold = sentences()
    output = read(engine, [sentence.text for sentence in gold])
    return score(gold, [{(e.type, e.start, e.end) for e in found.entities} for found in output.texts])


def speed(engine: NerEngine, together: int, rounds: int = 10) -> float:
    """Sentences a second of processor time in tasks of `together` of them: the best of some rounds."""
    texts = [sentence.text for sentence in sentences()]
    texts = (texts * (-(-together // len(texts))))[: max(together, len(texts) // together * together)]
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()  # others may keep this machine busy
        for start in range(0, len(texts), together):
            read(engine, texts[start : start + together])
        best = min(best, time.process_time() - began)
    return len(texts) / best


def main() -> None:
    began = time.perf_counter()
    engine = NerEngine()
    info = engine.load()
    seconds = time.perf_counter() - began
    result = measure(engine)
    print(f"{info.name} {info.version} ({info.model}), {len(sentences())} sentences\n")
    print("| type | entities | precision | recall |\n| --- | ---: | ---: | ---: |")
    for name, types in (*((kind, (kind,)) for kind in TYPES), ("all", TYPES)):
        count = sum(result.right[kind] + result.missed[kind] for kind in types)
        print(f"| {name} | {count} | {result.precision(*types):.3f} | {result.recall(*types):.3f} |")
    if "--speed" in sys.argv:
        single, batched = speed(engine, 1), speed(engine, 64)
        memory = psutil.Process().memory_info().rss / 2**20
        print(f"\nloaded in {seconds:.2f} s, {memory:.0f} MiB resident in all")
        print(f"sentences a second of one core: {single:.0f} one by one, {batched:.0f} in tasks of 64")
    if "--faults" in sys.argv:
        print("", *result.faults, sep="\n")


if __name__ == "__main__":
    main()
