"""Prints how well the default backend finds the entities of gold.txt: `python -m tests.ner.quality`.

With `--faults` each sentence that was not read right is shown, too. The settings apply
(INFERQ_NER_BACKEND=…).
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from consumers.engine import Context
from consumers.ner import NerTask
from consumers.ner.engine import NerEngine
from tests.ner.gold import TYPES, Score, score, sentences


def measure(engine: NerEngine) -> Score:
    """The score of a loaded engine on all the sentences."""
    gold = sentences()
    task = NerTask.model_validate(
        {"task_id": "gold", "task_type": "ner", "texts": [sentence.text for sentence in gold]}
    )
    with TemporaryDirectory() as folder:
        context = Context(Path(folder), {}, lambda fraction, note: None, lambda: False)
        output = engine.run(task, context)
    return score(gold, [{(e.type, e.start, e.end) for e in read.entities} for read in output.texts])


def main() -> None:
    engine = NerEngine()
    info = engine.load()
    result = measure(engine)
    print(f"{info.name} {info.version} ({info.model}), {len(sentences())} sentences\n")
    print("| type | entities | precision | recall |\n| --- | ---: | ---: | ---: |")
    for name, types in (*((kind, (kind,)) for kind in TYPES), ("all", TYPES)):
        count = sum(result.right[kind] + result.missed[kind] for kind in types)
        print(f"| {name} | {count} | {result.precision(*types):.3f} | {result.recall(*types):.3f} |")
    if "--faults" in sys.argv:
        print("", *result.faults, sep="\n")


if __name__ == "__main__":
    main()
