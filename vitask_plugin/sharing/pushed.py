"""Which files of a checkpoint's folder others need, without what only this machine knows.

Listed by name, so that whatever else lies in the folder stays: images, features, optimizer states, logs, training
arguments. In configurations a path becomes the Hub's name of what it leads to, or the last part of it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from vitask_plugin import model_folder
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.record import checkpoint
from vitask_plugin.sharing.base import base_model
from vitask_plugin.sharing.card import CARD_FILE
from vitask_plugin.sharing.facts import FACTS_FILE

_MODEL = ("model.safetensors", "model-*-of-*.safetensors", model_folder.ADAPTER_FILE)  # one of them is there
WEIGHTS = (
    *_MODEL,
    *("model.safetensors.index.json", model_folder.NON_LORA_FILE, model_folder.CONNECTOR_FILE),
)
# Their texts may name places.
SETTINGS = (
    *(model_folder.CONFIG_FILE, "generation_config.json", model_folder.ADAPTER_CONFIG_FILE, "tokenizer_config.json"),
    *(*model_folder.PROCESSOR_FILES, checkpoint.RECORD_FILE, model_folder.CALIBRATION_FILE, FACTS_FILE),
)
NAMES = (*WEIGHTS, *SETTINGS, *model_folder.TOKENIZER_FILES, CARD_FILE)
_ABSOLUTE = re.compile(r"(/[^/\s<>{}][^\n]*/|~/|\.\.?/|[A-Za-z]:[\\/])[^\n]*")
# They say how to go on training here, and how large the files of this folder are.
_OF_THE_FOLDER = (checkpoint.RUN, checkpoint.FILES)


@dataclass(frozen=True)
class Pushed:
    """One file.

    Attributes:
        content: the file itself, or what it says to others.
        replaced: {what a setting is called: (the place, what stands there now)}.
    """

    name: str
    content: Path | bytes
    replaced: dict[str, tuple[str, str]]

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


def pushed(folder: str | Path) -> list[Pushed]:
    """The files for others, by name.

    Raises:
        VITaskError: no checkpoint of VITask, no model card, or a card that names a place of this machine.
    """
    folder = Path(folder)
    if not (folder / checkpoint.RECORD_FILE).is_file():
        raise VITaskError(
            f"{str(folder)!r} has no {checkpoint.RECORD_FILE}, so it is no output of a training with VITask; give one"
        )
    if not (folder / CARD_FILE).is_file():
        raise VITaskError(f"{str(folder)!r} has no model card ({CARD_FILE}); write it with `vitask card {folder}`")
    there = sorted(path for path in folder.iterdir() if path.is_file() and _is_any(path.name, NAMES))
    if not any(_is_any(path.name, _MODEL) for path in there):
        raise VITaskError(f"{str(folder)!r} holds no weights ({', '.join(_MODEL)}); train it to its end")
    files = [_read(path) for path in there]
    _check_texts(folder, files)
    return files


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _read(path: Path) -> Pushed:
    if path.name not in SETTINGS:
        return Pushed(path.name, path, {})
    found, replaced = read_json(path, "settings"), {}
    if path.name == checkpoint.RECORD_FILE:
        found = {key: value for key, value in found.items() if key not in _OF_THE_FOLDER}
    for owner, key, value in _texts(found):
        told = _of_calibration(key, value) if path.name == model_folder.CALIBRATION_FILE else value
        if told == value and is_place(value):
            base = base_model(value)
            told = base.hub or base.name
        if told != value:
            owner[key] = told
            replaced[str(key)] = value, told
    return Pushed(path.name, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode(), replaced)


def _of_calibration(key: Any, text: str) -> str:
    """Of its data files the names alone, wherever one stands: the paths are relative to where it was fitted."""
    if key == "path":
        return PurePath(text).name
    # The sentences of earlier versions end with a path.
    return re.sub(r"/.*/", "", text) if key == "training_data" else text


def _texts(found: Any) -> Iterator[tuple[Any, Any, str]]:
    """(the object or list, the key in it, the text) of each text in parsed JSON."""
    pairs = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, value in list(pairs):
        if isinstance(value, str):
            yield found, key, value
        else:
            yield from _texts(value)


def is_place(text: str) -> bool:
    """Whether a setting is a path of this machine: an absolute one, or one that leads to something here."""
    if _ABSOLUTE.fullmatch(text):
        return True
    # As one types it, from where one stands.
    return "/" in text.rstrip("/") and "\n" not in text and len(text) < 1024 and Path(text).exists()


def _check_texts(folder: Path, files: list[Pushed]) -> None:
    """Refuses a card that somebody has written a place into."""
    places = {str(folder.absolute()), str(Path.home()), *(was for one in files for was, _ in one.replaced.values())}
    card = (folder / CARD_FILE).read_text(encoding="utf-8")
    named = sorted(place for place in places if len(Path(place).parts) > 2 and place in card)
    if named:
        raise VITaskError(
            f"the model card {str(folder / CARD_FILE)!r} names {named[0]!r}, a place of this machine; take it out, or "
            "write the card anew with `vitask card`"
        )
