"""Paths below a folder by their text, links followed; JSON as editors and spreadsheets save it."""

import codecs
import json
import os
from pathlib import Path

import pytest

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_creatable, inside
from vitask_plugin.formats.json_text import read_json


def test_links_out_of_the_folder_are_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "train2017"
    elsewhere.mkdir(parents=True)
    (elsewhere / "1.jpg").write_bytes(b"an image")
    playground = tmp_path / "playground"
    playground.mkdir()
    (playground / "coco").symlink_to(elsewhere.parent)
    (playground / "one.jpg").symlink_to(elsewhere / "1.jpg")
    for name in ("coco/train2017/1.jpg", "one.jpg", "./coco//train2017/./1.jpg"):
        assert inside(playground, name).read_bytes() == b"an image"
    assert inside(playground, "coco/train2017/../train2017/1.jpg").read_bytes() == b"an image"
    (tmp_path / "linked").symlink_to(playground)
    assert inside(tmp_path / "linked", "one.jpg").is_file()
    # Behind the link `..` is elsewhere: the file that upstream would open is not the one that the text says.
    (playground / "secret.jpg").write_bytes(b"here")
    with pytest.raises(VITaskError, match="leaves the image folder"):
        inside(playground, "coco/../secret.jpg")


def test_no_link_is_resolved_for_a_plain_path(tmp_path, monkeypatch):
    inside(tmp_path, "a.png")  # the folder itself, once
    looked_at = []
    monkeypatch.setattr(os.path, "realpath", lambda *given, **_: looked_at.append(given))
    monkeypatch.setattr(Path, "resolve", lambda *given, **_: looked_at.append(given))
    monkeypatch.setattr(os, "lstat", lambda *given, **_: looked_at.append(given))
    assert inside(tmp_path, "b/c.png").name == "c.png" and looked_at == []


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("../x.png", "leaves the image folder"),
        ("a/../../x.png", "leaves the image folder"),
        ("a/./../../a/x.png", "leaves the image folder"),
        ("/etc/x.png", "leaves the image folder"),
        ("//server/x.png", "leaves the image folder"),
        ("C:\\x.png", "leaves the image folder"),
        ("c:/x.png", "leaves the image folder"),
        ("\\\\server\\share\\x.png", "leaves the image folder"),
        ("..\\x.png", "leaves the image folder"),
        ("a\\..\\..\\x.png", "leaves the image folder"),
        ("http://host/x.png", "is an address"),
        ("file:///etc/x.png", "is an address"),
        ("data:image/png;base64,AAAA", "is an address"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("a\0.png", "holds a NUL character"),
        ("\ud800.png", "is not valid text"),
        (f"{'x' * 256}.png", "is longer than a file name can be"),
        ("\u00e9" * 200, "is longer than a file name can be"),
    ],
)
def test_paths_that_are_refused_by_their_text(tmp_path, name, what):
    with pytest.raises(VITaskError) as caught:
        inside(tmp_path, name)
    assert what in str(caught.value) and repr(str(tmp_path)) in str(caught.value)


def test_an_output_that_can_be_made_leaves_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    for place in ("new", "new/below/it", "there", "there/new"):
        check_creatable(tmp_path / place)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    # A link to nothing is in the way of a folder, too.
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(VITaskError, match=r"out' cannot be written, for '.+link' is a file and no folder"):
        check_creatable(tmp_path / "link" / "out")


@pytest.mark.parametrize("name", ["a..b.png", "..a/x.png", "a:b.png", "~/x.png", "%2e%2e/x.png", "C:x.png", "f" * 250])
def test_unusual_names_are_names(tmp_path, name):
    assert inside(tmp_path, name) == Path(os.path.realpath(tmp_path), name)


def test_json_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "data.json"
    value = [{"id": "\u00e9"}]
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8-sig")
    assert path.read_bytes().startswith(codecs.BOM_UTF8) and read_json(path, "data file") == value
    for encoding in ("utf-16", "utf-32"):
        path.write_text(json.dumps(value), encoding=encoding)
        with pytest.raises(VITaskError, match=rf"is in {encoding.upper()}, by its byte-order mark; save it in UTF-8"):
            read_json(path, "data file")
    path.write_bytes(b'["\xe9"]')
    with pytest.raises(VITaskError, match="is not readable JSON in UTF-8"):
        read_json(path, "data file")
