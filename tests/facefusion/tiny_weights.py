"""Writes tiny weights for FaceFusion 3.8 into the folder of the command line: `python tiny_weights.py FOLDER`.

FaceFusion's own Python runs this file; it has onnx. The weights stand in for those of FaceFusion's defaults, with
the same names, inputs and outputs:

- two faces are on every picture that has a bright pixel: a large one around (80, 80), a small one around (30, 140);
- a swapped face has the mean colour of the source's face;
- the content filter refuses red pictures.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

onnx: Any = importlib.import_module("onnx")
helper, numpy_helper = onnx.helper, onnx.numpy_helper
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

Shape = Sequence[int]
Outputs = Mapping[str, tuple[int, Shape]]


def write(
    name: str,
    inputs: Mapping[str, Shape],
    outputs: Outputs,
    nodes: Sequence[Any] = (),
    constants: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, and FaceFusion's checksum of it. An output without a node is constant."""
    values = {key: np.asarray(value) for key, value in (constants or {}).items()}
    made = {output for node in nodes for output in node.output}
    nodes = list(nodes)
    for output, (kind, shape) in outputs.items():
        if output not in made:
            if output not in values:
                values[output] = np.zeros(shape, np.int64 if kind == INT64 else np.float32)
            values[f"{output}_constant"] = values.pop(output)
            nodes.append(helper.make_node("Identity", [f"{output}_constant"], [output]))
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(key, FLOAT, shape) for key, shape in inputs.items()],
        [helper.make_tensor_value_info(key, kind, shape) for key, (kind, shape) in outputs.items()],
        [numpy_helper.from_array(value, key) for key, value in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.onnx").write_bytes(data)
    (folder / f"{name}.hash").write_text(format(zlib.crc32(data), "08x"))


def face(x: float, y: float, size: float) -> list[float]:
    """A column of the detector's output: box, score, and five landmarks with their scores."""
    landmarks = [(-0.22, -0.15), (0.22, -0.15), (0.0, 0.06), (-0.17, 0.3), (0.17, 0.3)]
    column = [x, y, size, size, 0.0]
    for across, down in landmarks:
        column += [x + across * size, y + down * size, 1.0]
    return column


def main() -> None:
    """Write all weights."""
    is_score = np.zeros((1, 20, 2), np.float32)
    is_score[0, 4] = 1
    write(
        "yoloface_8n",
        {"input": (1, 3, 640, 640)},
        {"output": (FLOAT, (1, 20, 2))},
        [
            helper.make_node("ReduceMax", ["input"], ["brightest"], keepdims=0),
            helper.make_node("Greater", ["brightest", "threshold"], ["bright"]),
            helper.make_node("Cast", ["bright"], ["score"], to=FLOAT),
            helper.make_node("Mul", ["is_score", "score"], ["scores"]),
            helper.make_node("Add", ["faces", "scores"], ["output"]),
        ],
        {
            "threshold": np.float32(0.2),
            "is_score": is_score,
            "faces": np.array([face(80, 80, 80), face(30, 140, 30)], np.float32).T[None],
        },
    )
    redness = [
        helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("MatMul", ["means", "weigh"], ["output"]),
    ]
    write("nsfw_1", {"input": (1, 3, 640, 640)}, {"output": (FLOAT, (1, 6, 10))})
    for name, side, weigh in (
        ("nsfw_2", 384, [[1, 0], [-1, 0], [0, 0]]),
        ("nsfw_3", 448, [[0, 0, 40, 0], [0, 0, -40, 0], [0, 0, 0, 0]]),
    ):
        write(
            name,
            {"input": (1, 3, side, side)},
            {"output": (FLOAT, (1, len(weigh[0])))},
            redness,
            {"weigh": np.array(weigh, np.float32)},
        )
    write(
        "2dfan4",
        {"input": (1, 3, 256, 256)},
        {"landmarks": (FLOAT, (1, 68, 3)), "heatmaps": (FLOAT, (1, 68, 64, 64))},
    )
    along = np.linspace(0.1, 0.9, 68, dtype=np.float32)
    write(
        "fan_68_5",
        {"input": (1, 5, 2)},
        {"output": (FLOAT, (1, 68, 2))},
        constants={"output": np.stack([along, np.full_like(along, 0.5)], axis=1)[None]},
    )
    write(
        "arcface_w600k_r50",
        {"input": (1, 3, 112, 112)},
        {"output": (FLOAT, (1, 512))},
        [
            helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["means"]),
            helper.make_node("Concat", ["means", "rest"], ["output"], axis=1),
        ],
        {"rest": np.full((1, 509), 1e-3, np.float32)},
    )
    ids: Outputs = dict.fromkeys(("race_id", "gender_id", "age_id"), (INT64, (1,)))
    write("fairface", {"input": (1, 3, 224, 224)}, ids)
    write("xseg_1", {"input": (1, 256, 256, 3)}, {"output": (FLOAT, (1, 256, 256, 1))})
    write("bisenet_resnet_34", {"input": (1, 3, 512, 512)}, {"output": (FLOAT, (1, 19, 512, 512))})
    write(
        "hyperswap_1a_256",
        {"source": (1, 512), "target": (1, 3, 256, 256)},
        {"output": (FLOAT, (1, 3, 256, 256))},
        [
            helper.make_node("Slice", ["source", "first", "last", "axis"], ["means"]),
            helper.make_node("Reshape", ["means", "as_pixel"], ["colour"]),
            helper.make_node("Mul", ["target", "nothing"], ["empty"]),
            helper.make_node("Add", ["empty", "colour"], ["output"]),
        ],
        {
            "first": np.array([0], np.int64),
            "last": np.array([3], np.int64),
            "axis": np.array([1], np.int64),
            "as_pixel": np.array([1, 3, 1, 1], np.int64),
            "nothing": np.float32(0),
        },
    )


if __name__ == "__main__":
    main()
