"""The PaddleNLP backend: with a stand-in for Taskflow's interface, and with the real one where it is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest

from inferq.consumers.engine import Context
from inferq.consumers.ner import NerOutput
from inferq.consumers.ner.engine import NerEngine, load_backend
from inferq.consumers.ner.settings import NerSettings
from inferq.consumers.ner.taskflow import TaskflowBackend
from inferq.schemas import InstallationError
from tests.ner.conftest import check, named, ner_task

with_paddlenlp = pytest.mark.skipif(
    importlib.util.find_spec("paddlenlp") is None, reason="paddlenlp is not installed"
)

# PaddleNLP's dependencies warn of their own doings when they are imported.
pytestmark = pytest.mark.filterwarnings("default")


class StandIn:
    """Taskflow("ner"): a list of (word, label) for each text, and no list around it where there is one text.

    https://github.com/PaddlePaddle/PaddleNLP/blob/develop/docs/model_zoo/taskflow.md
    """

    made_with: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[list[str]]] = []
    words: ClassVar[dict[str, list[str]]] = {
        "fast": ["张伟/PER", "昨天/TIME", "北京大学/ORG", "北京/LOC", "红楼梦/nw", "患者/n", "的/u"],
        "accurate": [
            "张伟/人物类_实体", "患者/人物类_概念", "昨天/时间类", "北京大学/组织机构类_教育组织机构",
            "北京/世界地区类", "糖尿病/疾病损伤类", "阿司匹林/药物类", "红楼梦/作品类_实体",
            "白菜/生物类_植物", "的/助词",
        ],
    }  # fmt: skip

    def __init__(self, task: str, **parameters: Any) -> None:
        assert task == "ner"
        self.made_with.append(parameters)
        self._labels = dict(word.split("/") for word in self.words[parameters["mode"]])

    def __call__(self, texts: list[str]) -> Any:
        # Taskflow leaves out blank texts, and fails on a first one that is blank.
        assert all(isinstance(text, str) and text.strip() for text in texts)
        self.asked.append(texts)
        results = [list(self._words(text)) for text in texts]
        return results[0] if len(results) == 1 else results

    def _words(self, text: str) -> Iterator[tuple[str, str]]:
        while text:
            word = next((word for word in self._labels if text.startswith(word)), text[0])
            yield word, self._labels.get(word, "w")
            text = text[len(word) :]


def fake(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    return module


@pytest.fixture
def taskflow(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    device = SimpleNamespace(is_compiled_with_cuda=lambda: True, cuda=SimpleNamespace(device_count=lambda: 2))
    monkeypatch.setitem(sys.modules, "paddle", fake("paddle", device=device, __version__="9"))
    monkeypatch.setitem(sys.modules, "paddlenlp", fake("paddlenlp", Taskflow=StandIn))
    monkeypatch.setattr(StandIn, "made_with", [])
    monkeypatch.setattr(StandIn, "asked", [])
    return StandIn


@pytest.fixture
def engine(taskflow: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> NerEngine:
    monkeypatch.setenv("INFERQ_NER_BACKEND", "paddlenlp")
    engine = NerEngine()
    engine.load()
    engine.warm_up()
    taskflow.asked.clear()
    return engine


def test_words_become_entities_with_their_offsets(
    engine: NerEngine, make_context: Callable[..., Context]
) -> None:
    text = "患者张伟昨天\n在北京大学的😀吃阿司匹林。\r\n糖尿病，《红楼梦》与白菜，北京"
    output = engine.run(ner_task(text=text), make_context())
    check(output, text)
    assert output.model == "wordtag"
    assert named(output) == [
        ("PER", "张伟"),
        ("TIME", "昨天"),
        ("ORG", "北京大学"),
        ("DRUG", "阿司匹林"),
        ("DISEASE", "糖尿病"),
        ("WORK", "红楼梦"),
        ("生物类", "白菜"),
        ("LOC", "北京"),
    ]
    assert [e.label for e in output.texts[0].entities][2] == "组织机构类_教育组织机构"
    assert all(e.score is None for e in output.texts[0].entities)


def test_the_fast_mode_has_lacs_labels(
    taskflow: type[StandIn], make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_NER_BACKEND", "paddlenlp")
    monkeypatch.setenv("INFERQ_NER_MODE", "fast")
    engine = NerEngine()
    info = engine.load()
    assert (info.name, info.model, info.device) == ("paddlenlp", "lac", "cpu")
    output = engine.run(ner_task(texts=["患者张伟", "北京的《红楼梦》"]), make_context())
    assert isinstance(output, NerOutput)
    assert [[(e.type, e.text, e.label) for e in read.entities] for read in output.texts] == [
        [("PER", "张伟", "PER")],
        [("LOC", "北京", "LOC"), ("WORK", "红楼梦", "nw")],
    ]


def test_many_texts_are_one_call(
    engine: NerEngine, taskflow: type[StandIn], make_context: Callable[..., Context]
) -> None:
    texts = [f"张伟{number}在北京" for number in range(100)]
    check(engine.run(ner_task(texts=texts), make_context()), texts)
    assert [len(asked) for asked in taskflow.asked] == [64, 36]
    long = "张伟在北京，" * 300
    check(engine.run(ner_task(text=long), make_context()), long)
    assert max(len(piece) for asked in taskflow.asked for piece in asked) <= TaskflowBackend.window


@pytest.mark.parametrize(
    ("device", "number", "place"), [("cpu", -1, "cpu"), ("gpu", 0, "gpu:0"), ("cuda:1", 1, "gpu:1")]
)
def test_taskflow_gets_its_device_and_its_weights(
    taskflow: type[StandIn], tmp_path: Path, device: str, number: int, place: str
) -> None:
    backend = load_backend(
        NerSettings(ner_backend="paddlenlp", device=device, ner_mode="fast", ner_model_dir=tmp_path)
    )
    assert backend.info.device == place
    (made,) = taskflow.made_with
    assert (made["mode"], made["device_id"], made["task_path"]) == ("fast", number, str(tmp_path))
    assert made["batch_size"] == 64


def test_a_gpu_that_is_not_there_is_an_error_and_never_a_slow_cpu(taskflow: type[StandIn]) -> None:
    with pytest.raises(InstallationError, match="gpu:2, but paddlepaddle 9 finds no such GPU") as caught:
        load_backend(NerSettings(ner_backend="paddlenlp", device="cuda:2"))
    assert caught.value.code == "device_unavailable"
    assert not taskflow.made_with


@pytest.mark.parametrize(("missing", "said"), [("paddle", "paddlepaddle"), ("paddlenlp", "inferq.paddlenlp")])
def test_a_library_that_is_not_installed_is_named(
    taskflow: type[StandIn], monkeypatch: pytest.MonkeyPatch, missing: str, said: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InstallationError, match=said) as caught:
        load_backend(NerSettings(ner_backend="paddlenlp"))
    assert caught.value.code == "engine_not_installed"


def test_weights_that_cannot_be_had_are_said_so(
    taskflow: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: StandIn, task: str, **parameters: Any) -> None:
        raise ConnectionError("no route to bj.bcebos.com")

    monkeypatch.setattr(StandIn, "__init__", fail)
    with pytest.raises(InstallationError, match=r"no route.*INFERQ_NER_MODEL_DIR") as caught:
        load_backend(NerSettings(ner_backend="paddlenlp"))
    assert caught.value.code == "engine_not_loadable"


def test_words_that_do_not_stand_in_the_text_are_an_error_and_no_wrong_offset(
    engine: NerEngine, make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "_words", lambda self, text: iter([("李娜", "人物类_实体")]))
    with pytest.raises(RuntimeError, match=r"李娜.* is not at offset 0"):
        engine.run(ner_task(text="张伟"), make_context())


def test_nothing_of_paddle_is_imported_unless_it_is_chosen(engine: NerEngine) -> None:
    code = "import sys, inferq.consumers.ner.engine as e; e.NerEngine().load(); assert 'paddle' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={})


@with_paddlenlp
@pytest.mark.parametrize("mode", ["fast"])
def test_the_real_taskflow_takes_what_it_is_given(tmp_path: Path, mode: Literal["fast"]) -> None:
    """With random weights: the words mean nothing, but they have to be the text's."""
    random_weights(tmp_path)
    backend = TaskflowBackend(mode=mode, device="cpu", batch_size=8, threads=1, model_dir=tmp_path)
    pieces = ["张伟在北京。", "李娜，去了\0 上海", "甲" * 500, "😀"]
    for some in (pieces, pieces[:1]):
        for piece, spans in zip(some, backend.read(some), strict=True):
            assert all(0 <= span.start < span.end <= len(piece) for span in spans)


def random_weights(folder: Path) -> None:
    """The files of LAC's folder as Taskflow expects them."""
    import paddle  # type: ignore[import-not-found, unused-ignore]
    from paddlenlp.taskflow.models import BiGruCrf  # type: ignore[import-not-found, unused-ignore]

    tags = [f"{label}-{place}" for label in ("n", "PER", "LOC") for place in "BI"] + ["O"]
    words = [*"张伟李娜在北京去上海甲。，.,", "OOV"]
    (folder / "tag.dic").write_text("".join(f"{n}\t{tag}\n" for n, tag in enumerate(tags)), "utf-8")
    (folder / "word.dic").write_text("".join(f"{n}\t{word}\n" for n, word in enumerate(words)), "utf-8")
    (folder / "q2b.dic").write_text("，\t,\n。\t.\n", "utf-8")
    network = BiGruCrf(128, 128, len(words), len(tags))
    paddle.save(network.state_dict(), str(folder / "model_state.pdparams"))
