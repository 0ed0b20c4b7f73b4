"""JSON and text files that are none: each is one sentence with the place in it, and nothing is waited for."""

import os
import time

import pytest

from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import parse_json, read_json
from vitask_plugin.formats.schema import Count, Format, Name, Schema
from vitask_plugin.formats.text import read_text

DIGITS = "1" * 5000


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": {"b": [0, {"c": 1, "c": 2}]}}', "here: /a/b/1 has the key 'c' twice; leave one of them out"),
        ('{"a": 1, "a": 1}', "here: the whole has the key 'a' twice"),
        ('{"x/y~": [NaN]}', "here: /x~1y~0/0 is NaN, which JSON does not have; write a number, or null for none"),
        ("[1, -Infinity]", "here: /1 is -Infinity"),
        ("[1e999]", "here: /0 is '1e999', too large for a number"),
        (f'["1",\n{DIGITS}]', "here is not readable JSON (line 2 has a number of 5000 digits); write it again"),
        ("[" * 100_000, "here is not readable JSON (it is nested too deep); write it again"),
        ("", "here is not readable JSON (Expecting value: line 1 column 1 (char 0)); write it again"),
        ('{"a": 1,}', "here is not readable JSON ("),
    ],
)
def test_what_is_no_json_is_named_by_its_place(text, sentence):
    with pytest.raises(VITaskError) as caught:
        parse_json(text, "here")
    assert str(caught.value).startswith(sentence) and len(str(caught.value)) < 300


def test_what_programs_write_into_logs_is_read():
    assert parse_json('[NaN, 1e999, "\\ud83d"]', "here", finite=False)[1:] == [float("inf"), "\ud83d"]
    assert parse_json(f'["{DIGITS}", 1e3, -0.5, {{"a": null}}]', "here") == [DIGITS, 1e3, -0.5, {"a": None}]


def test_pipes_devices_folders_and_sizes_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"[" + b" " * 2000)
    begun = time.monotonic()
    for path, sentence in (
        (tmp_path / "pipe", "file '.*pipe' is a pipe; write its content into a JSON file and give that"),
        ("/dev/zero", "is a device"),
        (tmp_path, "is a folder; give the JSON file in it"),
        (tmp_path / "large", "has 2,001 bytes, and such a file has 1,000 at most; check the path"),
        (tmp_path / "large" / "x", "does not exist"),
        (tmp_path / "nul\0", "cannot be read .*null"),
    ):
        with pytest.raises(VITaskError, match=sentence):
            read_json(path, "file", largest=1000)
    assert time.monotonic() - begun < 5
    assert read_text(tmp_path / "large", "file", "text file", "a text") == "[" + " " * 2000


class Part(Schema):
    name: Name
    count: Count = 0


class Whole(Schema):
    parts: dict[str, Part]
    kind: int | list[int] = 0
    share: float = 0.5


WHOLE = Format(Whole, "write it again")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([], "f: the whole is []; expected an object; write it again"),
        ({}, "f: /parts is missing; write it again"),
        ({"parts": {"a": {}}}, "f: /parts/a/name is missing; write it again"),
        ({"parts": {"a": {"name": "x", "count": -1}}}, "f: /parts/a/count is -1; expected greater than or equal to 0;"),
        ({"parts": {"a": {"name": "x", "count": True}}}, "f: /parts/a/count is True; expected a whole number;"),
        ({"parts": {"a": {"name": "x", "count": 1.0}}}, "f: /parts/a/count is 1.0; expected a whole number;"),
        (
            {"parts": {"a": {"name": "x\n"}}},
            "f: /parts/a/name is 'x\\n'; expected a text of one line",
        ),
        ({"parts": {"a": {"name": "\ud83d"}}}, "f: /parts/a/name is '\\ud83d'; expected a text"),
        ({"parts": {}, "kind": "x"}, "f: /kind is 'x'; expected a whole number or a list; write it again"),
        ({"parts": {}, "kind": [1, "x"]}, "f: /kind is [1, 'x']; expected a whole number; write it again"),
        ({"parts": {}, "share": float("nan")}, "f: /share is nan; expected a finite number; write it again"),
        ({"parts": {}, "share": "y" * 500}, "f: /share is 'yyy"),
        ({"parts": [[[[[["deep"] * 100] * 100]]]]}, "f: /parts is ["),
    ],
)
def test_values_that_are_not_of_a_format_are_named_by_their_place(values, sentence):
    with pytest.raises(VITaskError) as caught:
        WHOLE.check(values, "f")
    assert str(caught.value).startswith(sentence) and len(str(caught.value)) < 250


def test_a_value_of_a_format_is_taken_as_it_is(tmp_path):
    (tmp_path / "f.json").write_text('{"parts": {"a": {"name": "x", "of a later version": 1}}, "share": 1}')
    assert WHOLE.read(tmp_path / "f.json", "file")["parts"]["a"] == {"name": "x", "of a later version": 1}
    (tmp_path / "f.json").write_text('{"parts": {"a": {"name": 5}}}')
    with pytest.raises(VITaskError, match=r"^file '.*f.json': /parts/a/name is 5; expected a text; write it again$"):
        WHOLE.read(tmp_path / "f.json", "file")
