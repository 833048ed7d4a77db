"""What an NER task may say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import jsonschema
import pytest

from inferq.consumers.ner import MAX_TERMS, MAX_TEXTS, NerOutput, NerTask, task_type
from inferq.producer.cli.arguments import Given, bundle, parse_assignments
from inferq.schemas import InvalidTask, parse_task


def parse(**fields: Any) -> NerTask:
    task = parse_task({"task_id": "a", "task_type": "ner", **fields})
    assert isinstance(task, NerTask)
    return task


def test_the_bare_message_of_any_producer_is_a_whole_task() -> None:
    assert parse(text="张伟在北京。").text == "张伟在北京。"
    assert parse(texts=["甲", "乙"]).texts == ("甲", "乙")
    assert parse(text_url="https://example.com/a.txt").inputs() == {"text_url": "https://example.com/a.txt"}
    assert parse(text="张伟").inputs() == {}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "exactly one of text, text_url and texts; got none of them"),
        ({"text": None}, "got none of them"),
        ({"text": "甲", "text_url": "data:,x"}, "got text and text_url"),
        ({"text": "甲", "texts": ["乙"]}, "got text and texts"),
        ({"text_url": "data:,x", "texts": ["乙"]}, "got text_url and texts"),
        ({"text": "甲", "text_url": "data:,x", "texts": ["乙"]}, "got text and text_url and texts"),
        ({"text": ""}, "text: .*empty"),
        ({"text": " \n\t\u3000\ufeff\0"}, "text: .*only white space"),
        ({"texts": []}, "texts: .*at least 1"),
        ({"texts": ["甲", "  "]}, r"texts\[1\] is empty"),
        ({"texts": ["甲"] * (MAX_TEXTS + 1)}, f"texts: .*at most {MAX_TEXTS}"),
        ({"text": 5}, "text: .*string"),
        ({"text": "甲" * 30_000}, "pass large inputs by URL"),
        ({"text_url": "file:///etc/passwd"}, "text_url"),
        ({"texte": "甲"}, "texte: is unknown"),
        ({"text": "甲", "options": {"dictonary": {}}}, "dictonary: is unknown"),
    ],
)
def test_a_wrong_task_is_refused_with_what_is_wrong(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidTask, match=said):
        parse(**fields)


@pytest.mark.parametrize(
    ("dictionary", "said"),
    [
        ({"": ["甲"]}, "dictionary"),
        ({"A B": ["甲"]}, "dictionary"),
        ({"9": ["甲"]}, "dictionary"),
        ({"A" * 33: ["甲"]}, "dictionary"),
        ({"A": "甲"}, "dictionary.A"),
        ({"A": [""]}, "at least 1 character"),
        ({"A": ["甲" * 65]}, "at most 64 characters"),
        ({"A": [" 甲"]}, "begin and end with a visible character"),
        ({"A": ["\u200b"]}, "a visible character"),
        ({"A": ["甲"], "B": ["甲"]}, "has two types, A and B"),
        ({"A": ["Ａ１"], "B": ["A1"]}, "has two types, A and B"),
        ({f"A{n}": ["甲"] for n in range(51)}, "at most 50"),
    ],
)
def test_a_wrong_dictionary_is_refused(dictionary: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidTask, match=said):
        parse(text="甲", options={"dictionary": dictionary})


def test_a_dictionary_has_a_limited_size() -> None:
    def task(count: int) -> NerTask:
        terms = {"A": [f"甲{n}" for n in range(count)]}
        return NerTask.model_validate(
            {"task_id": "a", "task_type": "ner", "text": "甲", "options": {"dictionary": terms}}
        )

    assert len(task(MAX_TERMS).options.dictionary["A"]) == MAX_TERMS
    with pytest.raises(ValueError, match=f"has {MAX_TERMS + 1} terms; at most {MAX_TERMS} are"):
        task(MAX_TERMS + 1)


def test_types_of_a_dictionary_may_be_chinese() -> None:
    assert parse(text="甲", options={"dictionary": {"疾病": ["高血压"]}}).options.dictionary == {
        "疾病": ("高血压",)
    }


def test_surrogates_come_in_pairs_or_not_at_all() -> None:
    whole = parse_task(b'{"task_id": "a", "task_type": "ner", "text": "\\ud83d\\ude00\\u5f20"}')
    assert isinstance(whole, NerTask)
    assert whole.text == "😀张"
    for text in ('"\\ud83d"', '"\\ude00\\u5f20"', '"\\u5f20\\ud83dx"'):
        with pytest.raises(InvalidTask, match="not JSON"):
            parse_task(f'{{"task_id": "a", "task_type": "ner", "text": {text}}}')


def test_a_task_travels_unchanged() -> None:
    for fields in ({"text": "\ufeff甲\r\n\0乙😀e\u0301"}, {"texts": ["甲", "乙"]}, {"text_url": "data:,x"}):
        task = parse(**fields, options={"dictionary": {"A": ["甲"]}})
        assert parse_task(task.body()) == task


def test_the_command_line_takes_texts_files_and_urls(tmp_path: Any) -> None:
    file = tmp_path / "文章.txt"
    file.write_text("张伟", "utf-8")
    made = bundle(task_type, ["张伟在北京", str(file), "https://example.com/a.txt"], given={})
    assert made == [
        {"text": Given("张伟在北京")},
        {"text_url": Given(str(file), file)},
        {"text_url": Given("https://example.com/a.txt")},
    ]
    for text in ("2024", "true", '"张伟"', "[1]", "null"):
        ((given,),) = (list(parts.values()) for parts in bundle(task_type, [text], given={}))
        assert given.value(None) == text  # type: ignore[arg-type]
        assert parse_assignments(task_type, [f"text={text}"]) == {"text": text}
    assert parse_assignments(task_type, ['texts=["甲"]', 'dictionary={"A": ["甲"]}']) == {
        "texts": ["甲"],
        "options": {"dictionary": {"A": ["甲"]}},
    }


def test_one_schema_fits_every_output() -> None:
    output = {
        "model": "m",
        "texts": [
            {"characters": 4, "entities": []},
            {"characters": 4, "entities": [{"type": "PER", "text": "张伟", "start": 0, "end": 2}]},
        ],
    }
    jsonschema.validate(output, NerOutput.model_json_schema())
    filled = json.loads(NerOutput.model_validate(output).model_dump_json())
    assert filled["texts"][1]["entities"] == [
        {"type": "PER", "text": "张伟", "start": 0, "end": 2, "score": None, "label": None, "source": "model"}
    ]


def test_describing_the_type_loads_no_library() -> None:
    heavy = "{'numpy', 'jieba', 'paddle', 'paddlenlp', 'threadpoolctl'}"
    code = (
        f"import sys, inferq.consumers.ner; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert task_type.arguments == ("text",)
