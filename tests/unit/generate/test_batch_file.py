import json
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict

from toile.core.errors import InvalidArgumentError
from toile.generate.batch_file import BadRow, read_rows
from toile.v1 import common_pb2, generate_pb2

DEFAULTS: dict[str, Any] = {"parent": "projects/p", "steps": 9, "request_id": "b"}
FORMATS = {
    "json": generate_pb2.PROMPT_FILE_FORMAT_JSON,
    "csv": generate_pb2.PROMPT_FILE_FORMAT_CSV,
    "yaml": generate_pb2.PROMPT_FILE_FORMAT_YAML,
}


def rows(text: str | bytes, kind: str, **defaults: Any) -> list[Any]:
    data = text.encode() if isinstance(text, str) else text
    request = generate_pb2.GenerateBatchRequest(
        file=data, format=FORMATS[kind], defaults={**DEFAULTS, **defaults}
    )
    return read_rows(request)


def said(row: generate_pb2.GenerateRequest) -> dict[str, Any]:
    """What a row adds to the defaults."""
    fields = MessageToDict(row, preserving_proto_field_name=True)
    return {k: v for k, v in fields.items() if k not in {"parent", "request_id", "priority"}}


THREE = {
    "json": '["a dress", {"prompt": "a coat", "steps": 4, "seeds": [1, 2]}, '
    '{"prompt": "x", "palette": {"colours": ["red"]}}]',
    "yaml": "- a dress\n- {prompt: a coat, steps: 4, seeds: [1, 2]}\n"
    "- prompt: x\n  palette:\n    colours: [red]\n",
    "csv": 'prompt,steps,seeds,palette\na dress,,,\na coat,4,"[1, 2]"\n'
    'x,,,"{""colours"": [""red""]}"\n',
}


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_says_the_same(kind: str) -> None:
    assert [said(row) for row in rows(THREE[kind], kind)] == [
        {"prompt": "a dress", "steps": 9},
        {"prompt": "a coat", "steps": 4, "seeds": ["1", "2"]},
        {"prompt": "x", "steps": 9, "palette": {"colours": ["red"]}},
    ]


def test_rows_have_ids_and_the_priority_of_a_batch() -> None:
    first, second = rows('["a", {"prompt": "b", "priority": "PRIORITY_INTERACTIVE"}]', "json")
    assert (first.request_id, second.request_id) == ("b/0", "b/1")
    assert first.priority == common_pb2.PRIORITY_BATCH
    assert second.priority == common_pb2.PRIORITY_INTERACTIVE
    (row,) = rows('["a"]', "json", request_id="", priority=common_pb2.PRIORITY_INTERACTIVE)
    assert not row.request_id
    assert row.priority == common_pb2.PRIORITY_INTERACTIVE


def test_what_a_row_says_replaces_what_the_defaults_say() -> None:
    defaults = {"seed": 5, "count": 2, "width": 64, "adapters": [{"model": "m"}]}
    text = json.dumps(
        [
            {"prompt": "a", "seeds": [1]},
            {"prompt": "b", "aspectRatio": "3:4"},
            {"prompt": "c", "adapters": [{"model": "n"}]},
            {"prompt": "d", "count": 3},
        ]
    )
    seeds, shape, adapters, count = rows(text, "json", **defaults)
    assert (list(seeds.seeds), seeds.HasField("seed"), seeds.count) == ([1], False, 0)
    assert (shape.aspect_ratio, shape.width) == ("3:4", 0)
    assert [a.model for a in adapters.adapters] == ["n"]
    assert (count.seed, count.count) == (5, 3)
    (source,) = rows(
        '[{"prompt": "e", "upscale": {"image": "i"}}]', "json", redesign={"image": "j"}
    )
    assert source.WhichOneof("source") == "upscale"


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ('[{"prompt": "a", "stepz": 3}]', "json", ["row 0", "stepz"]),
        ('["a", {"prompt": "a", "steps": "many"}]', "json", ["row 1", "steps"]),
        ('[{"prompt": "a", "palette": {"colors": []}}]', "json", ["row 0", "palette", "colors"]),
        ('[{"prompt": "a", "parent": "projects/rival"}]', "json", ["row 0", "parent"]),
        ('[{"prompt": "a", "request_id": "x"}]', "json", ["row 0", "request_id"]),
        ("[3]", "json", ["row 0", "neither"]),
        ("[null]", "json", ["row 0", "neither"]),
        ("- prompt: yes", "yaml", ["row 0", "prompt"]),
        ("- prompt: 2020-01-01", "yaml", ["row 0", "prompt"]),
        ("prompt,steps\na,3,4\n", "csv", ["row 0", "cells"]),
        ("prompt,seeds\na,3 4\n", "csv", ["row 0", "seeds"]),
        ("prompt,steps\na,3.5\n", "csv", ["row 0", "steps"]),
    ],
)
def test_a_bad_row_is_named_with_its_field(text: str, kind: str, words: list[str]) -> None:
    bad = rows(text, kind)[-1]
    assert isinstance(bad, BadRow)
    for word in words:
        assert word in bad.message


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("", "json", "BAD_PROMPT_FILE"),
        ("{}", "json", "BAD_PROMPT_FILE"),
        ('"a dress"', "json", "BAD_PROMPT_FILE"),
        ('["a"', "json", "BAD_PROMPT_FILE"),
        ("[" * 100_000, "json", "BAD_PROMPT_FILE"),
        (b"\xff\xfe\x00", "json", "BAD_PROMPT_FILE"),
        ("[]", "json", "NO_ROWS"),
        (json.dumps(["a"] * 1001), "json", "TOO_MANY_ROWS"),
        ("a: [", "yaml", "BAD_PROMPT_FILE"),
        ("prompt: a dress", "yaml", "BAD_PROMPT_FILE"),
        ("- &a x\n- *a", "yaml", "BAD_PROMPT_FILE"),
        ("- !!python/object/apply:os.getcwd []", "yaml", "BAD_PROMPT_FILE"),
        ("", "csv", "NO_ROWS"),
        ("prompt\n", "csv", "NO_ROWS"),
        ("prompt,colour\na,red\n", "csv", "BAD_PROMPT_FILE"),
        ("prompt,prompt\na,b\n", "csv", "BAD_PROMPT_FILE"),
        ('prompt\n"a', "csv", "BAD_PROMPT_FILE"),
        ("x" * (4 << 20) + "x", "csv", "BAD_PROMPT_FILE"),
    ],
)
def test_a_file_that_cannot_be_read(text: str | bytes, kind: str, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        rows(text, kind)
    assert caught.value.reason == reason
    assert caught.value.metadata["field"] == "file"


def test_the_format_must_be_said() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_rows(generate_pb2.GenerateBatchRequest(file=b"[]"))
    assert caught.value.metadata["field"] == "format"


def test_a_file_of_a_spreadsheet_is_read() -> None:
    (row,) = rows(b'\xef\xbb\xbfprompt,steps\r\n"a, ""b""\r\nc",4\r\n\r\n', "csv")
    assert said(row) == {"prompt": 'a, "b"\r\nc', "steps": 4}
