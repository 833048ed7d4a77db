"""Reading texts, the way a worker does."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.consumers.engine import Context, TaskAborted
from inferq.consumers.ner import NerOutput
from inferq.consumers.ner.backend import Span
from inferq.consumers.ner.engine import NerEngine, load_backend
from inferq.consumers.ner.settings import NerSettings
from inferq.consumers.runtime.messages import Done, Failed, FileRef
from inferq.consumers.runtime.process import EngineProcess, RunHooks
from inferq.schemas import EngineInfo, InstallationError, InvalidTask
from tests.ner.conftest import check, named, ner_task
from tests.ner.gold import sentences
from tests.ner.quality import measure

Read = Callable[..., NerOutput]
GOLD = [sentence.text for sentence in sentences()]
TEXT = "张伟于2023年5月1日在北京大学第一医院接受了手术。"


def test_people_places_organisations_and_times_are_found(read: Read) -> None:
    output = read(text=TEXT)
    assert output.model == "lac_small"
    assert [(e.type, e.text, e.start, e.end, e.score, e.source) for e in output.texts[0].entities] == [
        ("PER", "张伟", 0, 2, None, "model"),
        ("TIME", "2023年5月1日", 3, 12, None, "model"),
        ("ORG", "北京大学第一医院", 13, 21, None, "model"),
    ]


def test_quality_does_not_fall(engine: NerEngine) -> None:
    result = measure(engine)
    floors = {"PER": (0.88, 0.88), "LOC": (0.82, 0.82), "ORG": (0.86, 0.86), "TIME": (0.76, 0.88)}
    for kind, (precision, recall) in floors.items():
        assert result.precision(kind) > precision, (kind, result.faults)
        assert result.recall(kind) > recall, (kind, result.faults)


def test_the_gold_is_large_enough_to_mean_something() -> None:
    gold = sentences()
    assert len({sentence.text for sentence in gold}) == len(gold) >= 40
    assert all(sum(k == kind for s in gold for k, _, _ in s.entities) >= 30 for kind in ("PER", "LOC", "ORG"))


def test_a_batch_has_a_list_for_each_text_and_each_is_as_if_alone(read: Read) -> None:
    texts = [*GOLD, *GOLD[:3], "".join(GOLD)]
    assert list(read(texts=texts).texts) == [read(text=text).texts[0] for text in texts]


ANYTHING = st.text(
    st.one_of(st.sampled_from("张伟在北京。！，\n\r \u3000a😀\u0301\u200d\0\ufeff"), st.characters()),
    max_size=60,
)


@given(
    st.lists(st.one_of(ANYTHING, st.sampled_from(GOLD)).map(lambda text: f"{text}甲"), min_size=1, max_size=8)
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_equal_single_texts_and_offsets_hold_for_anything(read: Read, texts: list[str]) -> None:
    assert list(read(texts=texts).texts) == [read(text=text).texts[0] for text in texts]


@pytest.mark.parametrize(
    "before",
    [
        "\ufeff",
        "😀👨‍👩‍👧 ",
        "e\u0301ü\n",
        "\r\n\r\n",
        "\0\0",
        "第一句。第二句！\r\n",
        "\u3000\u3000",
        "𠮷野家",
    ],
    ids=ascii,
)
def test_what_stands_before_moves_the_offsets_and_nothing_else(read: Read, before: str) -> None:
    alone = read(text=f"\n{TEXT}").texts[0].entities
    for output in (read(text=f"{before}\n{TEXT}"), read(f"{before}\n{TEXT}".encode())):
        entities = [e for e in output.texts[0].entities if e.start > len(before)]
        assert [(e.type, e.start - len(before), e.end - len(before)) for e in entities] == [
            (e.type, e.start, e.end) for e in alone
        ]


def test_entities_end_where_their_letters_end(read: Read) -> None:
    for text in ("记者李雪梅\r\n新华社\t\n", "去 Tom 家", "张伟\0", "\ufeff张伟"):
        for entity in read(text=text).texts[0].entities:
            assert entity.text.strip("\0\ufeff \t\r\n") == entity.text


@pytest.mark.parametrize(
    ("text", "entity"),
    [
        ("张伟😀去了北京。", ("PER", "张伟")),
        ("张伟☺️去了北京。", ("PER", "张伟")),
        ("买买提•吐尔逊在新疆工作。", ("PER", "买买提•吐尔逊")),
        ("买买提‧吐尔逊在新疆工作。", ("PER", "买买提‧吐尔逊")),
        ("买买提・吐尔逊在新疆工作。", ("PER", "买买提・吐尔逊")),
        ("买买提•在新疆工作。", ("PER", "买买提")),
        ("会议于2023-05-01在上海举行。", ("TIME", "2023-05-01")),
        ("<p>张伟在<b>北京</b>大学读书。</p>", ("ORG", "北京</b>大学")),
        ("李小明今天上午在北京大学第一医\n院接受了手术。", ("ORG", "北京大学第一医\n院")),
    ],
)
def test_an_entity_is_whole_and_nothing_more(read: Read, text: str, entity: tuple[str, str]) -> None:
    entities = [(found.type, found.text) for found in read(text=text).texts[0].entities]
    assert entity in entities
    assert "WORK" not in {kind for kind, _ in entities}


def test_a_file_behind_a_url_is_read(read: Read) -> None:
    assert named(read("\ufeff张伟在北京。\r\n李娜在上海。\r\n".encode())) == [
        ("PER", "张伟"),
        ("LOC", "北京"),
        ("PER", "李娜"),
        ("LOC", "上海"),
    ]


def test_parts_of_an_address_and_of_a_date_are_one(read: Read) -> None:
    assert named(read(text="2021年第三季度，她住在江苏省南京市鼓楼区。")) == [
        ("TIME", "2021年第三季度"),
        ("LOC", "江苏省南京市鼓楼区"),
    ]


def test_a_dictionary_adds_terms_and_goes_before_the_model(read: Read) -> None:
    text = "患者张伟因2型糖尿病在北京大学第一医院服用二甲双胍。"
    terms = {"DISEASE": ["糖尿病", "2型糖尿病"], "DRUG": ["二甲双胍"], "SCHOOL": ["北京大学"]}
    output = read(text=text, options={"dictionary": terms})
    assert named(output) == [
        ("PER", "张伟"),
        ("DISEASE", "2型糖尿病"),
        ("SCHOOL", "北京大学"),
        ("DRUG", "二甲双胍"),
    ]
    assert [e.source for e in output.texts[0].entities] == ["model", *["dictionary"] * 3]
    batch = read(texts=[text, "他得了糖尿病"], options={"dictionary": terms})
    assert batch.texts[0] == output.texts[0]
    assert [e.text for e in batch.texts[1].entities] == ["糖尿病"]


def long_text(characters: int) -> str:
    text = "".join(GOLD)
    return (text * (characters // len(text) + 1))[:characters]


def test_the_longest_text_is_read_in_steps_that_tell_and_can_be_stopped(
    engine: NerEngine, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    text = long_text(100_000)
    path = tmp_path / "long.txt"
    path.write_text(text, "utf-8")
    reports: list[tuple[float, str]] = []
    output = engine.run(ner_task(text_url="data:,x"), make_context(path, reports))
    check(output, text)
    alone = engine.run(ner_task(text="".join(GOLD)), make_context()).texts[0].entities
    # Further on in the text, the same sentences give the same.
    shift = len("".join(GOLD))
    entities = output.texts[0].entities
    assert entities[: len(alone)] == alone
    assert [(e.start - shift, e.text) for e in entities[len(alone) : 2 * len(alone)]] == [
        (e.start, e.text) for e in alone
    ]
    fractions = [fraction for fraction, _ in reports]
    assert len(fractions) > 12
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)
    assert reports[1][1].endswith("of 100000 characters")

    reports.clear()
    with pytest.raises(TaskAborted):
        engine.run(ner_task(text_url="data:,x"), make_context(path, reports, lambda: len(reports) == 3))
    assert len(reports) == 3


def test_an_abort_is_seen_before_anything_is_computed(
    engine: NerEngine, make_context: Callable[..., Context]
) -> None:
    with pytest.raises(TaskAborted):
        engine.run(ner_task(text=TEXT), make_context(abort=lambda: True))


class Watching:
    """A model that notes its batches, and finds a person at the start of each piece."""

    info = EngineInfo(name="watching", version="1", model="none", device="cpu")
    window = 512

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def read(self, pieces: Sequence[str]) -> list[list[Span]]:
        self.seen.append([len(piece) for piece in pieces])
        return [[Span(0, 1, "PER", "x", 0.5)] for _ in pieces]


def test_batches_are_bounded_in_sentences_and_in_characters(make_context: Callable[..., Context]) -> None:
    model = Watching()
    engine = NerEngine(backend=model)
    text = "甲" * 3000 + "。" + "".join("乙" * (n % 40 + 1) + "。" for n in range(1000))
    output = engine.run(ner_task(text=text), make_context())
    check(output, text)
    assert output.texts[0].entities[0].score == 0.5
    seen = model.seen
    assert sum(map(sum, seen)) == len(text)
    assert max(map(len, seen)) == 64
    assert max(len(lengths) * max(lengths) for lengths in seen) <= 8192
    assert sum(len(lengths) * max(lengths) for lengths in seen) < 1.3 * len(text)


TASKS = st.fixed_dictionaries(
    {
        "texts": st.lists(
            st.sampled_from(GOLD) | ANYTHING.map(lambda text: f"{text}甲"), min_size=1, max_size=3
        )
    },
    optional={"options": st.just({"dictionary": {"PLACE": ["北京", "在"]}})},
)


@given(st.lists(TASKS, min_size=2, max_size=6))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tasks_computed_together_give_what_each_gives_alone(
    engine: NerEngine, make_context: Callable[..., Context], given_tasks: list[dict[str, Any]]
) -> None:
    tasks = [ner_task(**fields) for fields in given_tasks]
    together = engine.run_batch(tasks, [make_context() for _ in tasks])
    assert together == [engine.run(task, make_context()) for task in tasks]


def test_tasks_of_one_sentence_fill_one_batch_of_the_model(make_context: Callable[..., Context]) -> None:
    model = Watching()
    engine = NerEngine(backend=model)
    tasks = [ner_task(text=text) for text in GOLD[:64]]
    assert engine.batch_size == 64
    assert len({engine.batch_key(task) for task in tasks}) == 1
    outputs = engine.run_batch(tasks, [make_context() for _ in tasks])
    assert [len(lengths) for lengths in model.seen] == [64]
    for task, output in zip(tasks, outputs, strict=True):
        assert isinstance(output, NerOutput)
        check(output, task.text or "")


@pytest.mark.parametrize(
    "fields",
    [{"text": "甲" * 1025}, {"texts": ["甲"] * 9}, {"texts": ["甲" * 520] * 2}, {"text_url": "data:,x"}],
    ids=["long", "many", "long together", "file"],
)
def test_a_task_that_would_hold_up_others_goes_alone(engine: NerEngine, fields: dict[str, Any]) -> None:
    small, large = ner_task(text="甲" * 1024), ner_task(**fields)
    assert engine.batch_key(small) == engine.batch_key(ner_task(texts=["甲"] * 8))
    assert engine.batch_key(large) != engine.batch_key(small)
    assert engine.batch_key(large) != engine.batch_key(ner_task(**fields, tenant="another"))


def test_a_bad_task_and_a_cancelled_one_cost_the_others_nothing(make_context: Callable[..., Context]) -> None:
    model = Watching()
    engine = NerEngine(NerSettings(ner_max_characters=300), backend=model)
    text = "。".join(f"{number}" for number in range(100))
    reports: list[tuple[float, str]] = []
    outcomes = engine.run_batch(
        [ner_task(text="甲" * 301), ner_task(text=text), ner_task(text=text), ner_task(text="甲")],
        [
            make_context(),
            make_context(abort=lambda: len(model.seen) == 2),
            make_context(reports=reports),
            make_context(abort=lambda: True),
        ],
    )
    sentences_read = sum(map(len, model.seen))
    invalid, cancelled, whole, never_begun = outcomes
    assert isinstance(invalid, InvalidTask)
    assert invalid.code == "text_too_long"
    assert isinstance(cancelled, TaskAborted)
    assert isinstance(never_begun, TaskAborted)
    assert whole == engine.run(ner_task(text=text), make_context())
    assert 100 < sentences_read < 200  # those of the cancelled task that were left were not read
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert all(0 < fraction < 1 for fraction in fractions)


def test_a_task_that_raises_in_a_batch_fails_alone(
    make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(text: str) -> list[Span]:
        if text == "乙":
            raise ZeroDivisionError
        return []

    monkeypatch.setattr("inferq.consumers.ner.engine.iso_dates", find)
    tasks = [ner_task(text=text) for text in ("甲", "乙", "丙")]
    outcomes = NerEngine(backend=Watching()).run_batch(tasks, [make_context() for _ in tasks])
    assert [type(outcome) for outcome in outcomes] == [NerOutput, ZeroDivisionError, NerOutput]


def test_two_runs_leave_no_files_and_no_memory(
    engine: NerEngine, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(long_text(20_000), "utf-8")

    def run() -> None:
        engine.run(ner_task(text_url="data:,x"), make_context(path))
        gc.collect()

    run()
    process = psutil.Process()
    before, files = process.memory_info().rss, process.num_fds()
    for _ in range(4):
        run()
    assert process.memory_info().rss - before < 20 << 20
    # Fewer are no leak: collecting garbage closes what earlier tests in this process left behind.
    assert process.num_fds() <= files
    assert list(tmp_path.iterdir()) == [path]


def test_an_engine_is_loaded_warmed_up_and_closed() -> None:
    engine = NerEngine()
    info = engine.load()
    assert (info.name, info.version, info.model, info.device) == ("lac", "0.42.1", "lac_small", "cpu")
    engine.warm_up()
    engine.close()
    with pytest.raises(RuntimeError, match=r"call load\(\) first"):
        engine.warm_up()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INFERQ_DEVICE", "tpu"),
        ("INFERQ_NER_BACKEND", "spacy"),
        ("INFERQ_NER_MODE", "slow"),
        ("INFERQ_NER_DEVICE", "cuda:x"),
        ("INFERQ_NER_BATCH_SIZE", "0"),
        ("INFERQ_NER_MAX_CHARACTERS", "-1"),
    ],
)
def test_a_setting_that_means_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InstallationError, match=name):
        NerEngine()


def test_lac_never_runs_on_the_cpu_where_a_gpu_was_asked_for() -> None:
    for settings_ in (NerSettings(device="gpu"), NerSettings(device="cuda:1"), NerSettings(ner_device="gpu")):
        with pytest.raises(InstallationError, match="INFERQ_NER_DEVICE=cpu") as caught:
            load_backend(settings_)
        assert caught.value.code == "device_unavailable"
    assert load_backend(NerSettings(device="gpu", ner_device="cpu")).info.device == "cpu"


def test_the_engine_process_reads_texts_and_refuses_files_that_are_none(tmp_path: Path) -> None:
    engine = EngineProcess("ner")
    engine.spawn()
    try:
        info = engine.wait_ready(limit=60)
        assert info.model == "lac_small"
        notes: list[tuple[float, str]] = []

        def run(content: bytes) -> Done | Failed:
            path = tmp_path / "input"
            path.write_bytes(content)
            answer = engine.run(
                ner_task(text_url="data:,x").body().decode(),
                str(tmp_path / "scratch"),
                {"text_url": FileRef(path=path, content_type="text/plain", bytes=len(content))},
                watch=RunHooks(lambda fraction, note: notes.append((fraction, note)), lambda: None),
                time_limit=60,
                abort_grace=1,
            )
            assert isinstance(answer, Done | Failed)
            return answer

        answer = run(TEXT.encode())
        assert isinstance(answer, Done)
        assert answer.output is not None
        check(NerOutput.model_validate_json(answer.output), TEXT)
        refused = run("张伟".encode("utf-16"))
        assert isinstance(refused, Failed)
        assert (refused.code, refused.invalid) == ("not_utf8", True)
        assert engine.alive
    finally:
        engine.close()


def test_the_command_that_measures_quality_prints_its_table() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.ner.quality", "--faults"],
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| PER | 58 | 0." in run.stdout
    assert "| all | 224 | 0." in run.stdout
    assert "missed" in run.stdout
    assert run.stderr == ""
