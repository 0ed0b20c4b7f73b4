"""`vitask patch` on copies of the real LLaVA: twice, reverted, other versions, local changes, wrong folders."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.llava import patch

SCRIPT = "llava/train/train.py"
UPSTREAM = Path(importlib.util.find_spec("llava").submodule_search_locations[0])
ORIGINAL = (UPSTREAM / "train" / "train.py").read_bytes()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The two files of a LLaVA checkout that matter here, from the installed LLaVA."""
    directory = tmp_path / "LLaVA"
    (directory / "llava" / "train").mkdir(parents=True)
    shutil.copy(UPSTREAM / "train" / "train.py", directory / SCRIPT)
    (directory / "pyproject.toml").write_text('[project]\nname = "llava"\nversion = "1.2.2.post1"\n')
    return directory


def content(checkout: Path) -> bytes:
    return (checkout / SCRIPT).read_bytes()


def files(directory: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in directory.rglob("*") if path.is_file()}


def test_only_marked_lines_are_added_at_the_two_places(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", str(checkout)]) == 0
    assert "4 lines added for LLaVA 1.2.2" in capsys.readouterr().out
    before, after = ORIGINAL.decode().splitlines(), content(checkout).decode().splitlines()
    added = [line for line in after if line.endswith("  # vitask")]
    assert len(added) == 4 == len(after) - len(before)
    assert [line for line in after if line not in added] == before
    # Workarounds come before the first import that needs them; `train` is wrapped after it is defined, before it runs.
    order = [
        "compat.prepare()  # vitask",
        "from llava.train.llava_trainer import LLaVATrainer",
        "train = wrap(train)  # vitask",
    ]
    assert [after.index(line) for line in order] == sorted(after.index(line) for line in order)
    assert after[after.index(order[-1]) + 1] == 'if __name__ == "__main__":'
    compile(content(checkout), SCRIPT, "exec")


def test_nothing_else_is_touched(checkout: Path) -> None:
    before = files(checkout)
    list(patch.apply(checkout))
    changed = {name for name, digest in files(checkout).items() if before.get(name) != digest}
    assert changed == {str(checkout / SCRIPT)}


def test_applied_twice_changes_nothing(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", str(checkout)]) == 0
    once, time = content(checkout), (checkout / SCRIPT).stat().st_mtime_ns
    capsys.readouterr()
    assert main(["patch", str(checkout)]) == 0
    assert "has the lines already; nothing was changed" in capsys.readouterr().out
    assert (content(checkout), (checkout / SCRIPT).stat().st_mtime_ns) == (once, time)


def test_revert_restores_the_bytes(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["patch", str(checkout)]) == 0
        assert content(checkout) != ORIGINAL
        assert main(["patch", str(checkout), "--revert"]) == 0
        assert content(checkout) == ORIGINAL
    capsys.readouterr()
    assert main(["patch", str(checkout), "--revert"]) == 0
    assert "no lines of the patch; nothing was changed" in capsys.readouterr().out
    assert content(checkout) == ORIGINAL


def test_line_endings_are_kept(checkout: Path) -> None:
    windows = ORIGINAL.replace(b"\n", b"\r\n")
    (checkout / SCRIPT).write_bytes(windows)
    (checkout / "pyproject.toml").unlink()  # known by its content alone
    list(patch.apply(checkout))
    assert content(checkout).count(b"\r\n") == content(checkout).count(b"\n") == windows.count(b"\n") + 4
    list(patch.revert(checkout))
    assert content(checkout) == windows


def test_no_newline_at_the_end_and_bytes_that_are_no_utf8_survive(checkout: Path) -> None:
    odd = b"# \xff\r\r\n" + ORIGINAL.rstrip(b"\n") + b"  # M\xfcller"
    (checkout / SCRIPT).write_bytes(odd)
    list(patch.apply(checkout))
    assert content(checkout) != odd
    list(patch.revert(checkout))
    assert content(checkout) == odd


def test_permissions_and_links_are_kept(checkout: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.py"
    shutil.move(checkout / SCRIPT, real)
    real.chmod(0o750)
    (checkout / SCRIPT).symlink_to(real)
    list(patch.apply(checkout))
    assert (checkout / SCRIPT).is_symlink()
    assert b"# vitask" in real.read_bytes()
    assert real.stat().st_mode & 0o777 == 0o750


def test_local_changes_elsewhere_are_kept(checkout: Path) -> None:
    changed = ORIGINAL.replace(b"local_rank = None", b"local_rank = None\nMY_OWN = 1", 1)
    assert changed != ORIGINAL
    (checkout / SCRIPT).write_bytes(changed)
    list(patch.apply(checkout))
    assert content(checkout).count(b"# vitask") == 4
    assert b"MY_OWN = 1" in content(checkout)
    list(patch.revert(checkout))
    assert content(checkout) == changed


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'if __name__ == "__main__":', b"if True:"),
        (b"def train(attn_implementation=None):", b"def train():"),
        (b"import os\n", b""),
        (b"import copy\n", b"import copy\nimport os\n"),
    ],
)
def test_local_changes_near_the_places_are_refused(
    checkout: Path, old: bytes, new: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ORIGINAL.replace(old, new, 1)
    assert changed != ORIGINAL
    (checkout / SCRIPT).write_bytes(changed)
    assert main(["patch", str(checkout)]) == 1
    assert "was changed near a place that the patch needs" in capsys.readouterr().err
    assert content(checkout) == changed
    assert {path.name for path in (checkout / "llava" / "train").iterdir()} == {"train.py"}


def test_other_version_is_refused_by_name(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ORIGINAL + b"\n# an older one\n"
    (checkout / SCRIPT).write_bytes(changed)
    (checkout / "pyproject.toml").write_text('[project]\nname = "llava"\nversion = "1.1.3"\n')
    assert main(["patch", str(checkout)]) == 1
    shown = capsys.readouterr().err
    assert "is LLaVA 1.1.3" in shown
    assert "1.2.2.post1" in shown
    assert content(checkout) == changed


@pytest.mark.parametrize("project", [None, '[project]\nname = "other"\nversion = "1.2.2"\n', "\xff"])
def test_unknown_content_without_a_version_is_refused(
    checkout: Path, project: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / SCRIPT).write_bytes(ORIGINAL + b"\n# changed\n")
    (checkout / "pyproject.toml").unlink()
    if project is not None:
        (checkout / "pyproject.toml").write_text(project, encoding="latin-1")
    assert main(["patch", str(checkout)]) == 1
    assert "is no version that a patch is for" in capsys.readouterr().err
    assert content(checkout) == ORIGINAL + b"\n# changed\n"


@pytest.mark.parametrize("words", [[], ["--revert"]])
def test_wrong_folder_is_refused(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for directory in (tmp_path, tmp_path / "nothing"):
        assert main(["patch", str(directory), *words]) == 1
        assert f"'{directory}' is no LLaVA checkout" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_lines_of_another_patch_are_refused_and_reverted(checkout: Path) -> None:
    list(patch.apply(checkout))
    (checkout / SCRIPT).write_bytes(content(checkout).replace(b"compat.prepare()", b"compat.prepare(1)"))
    with pytest.raises(VITaskError, match="lines of another version of this patch; run `vitask patch --revert"):
        list(patch.apply(checkout))
    list(patch.revert(checkout))
    assert content(checkout) == ORIGINAL


def test_a_failed_write_leaves_the_file_as_it_was(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*paths: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        list(patch.apply(checkout))
    assert content(checkout) == ORIGINAL
    assert {path.name for path in (checkout / "llava" / "train").iterdir()} == {"train.py"}


def test_patch_files_hold_added_lines_and_anchors_only() -> None:
    upstream = set(ORIGINAL.decode().splitlines())
    found = patch.patches()
    assert found
    for one in found:
        assert not set(one.added()) & upstream
        assert not {line.removesuffix(patch.MARK) for line in one.added()} & upstream
        # An anchor is one line of upstream's, no passage.
        assert all("\n" not in insertion.before for insertion in one.insertions)
        assert len(one.insertions) + len(one.needs) <= 4


@pytest.mark.parametrize("text", [b"", b"a", b"a\n", b"a\r\nb", b"\r\n", b"a\rb\n", b"\n\n", b"a\r"])
def test_split_and_join_are_inverse(text: bytes) -> None:
    assert patch.join(patch.split(text)) == text
