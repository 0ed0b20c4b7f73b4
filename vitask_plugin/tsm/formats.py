"""What a checkpoint file really is, told from its first bytes: many files that people give are no torch checkpoints."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json

_SAVE = "save the weights alone where its code runs: torch.save(model.state_dict(), 'weights.pth')"
_CONVERT = f"load it with the library that wrote it, copy the weights into the torch model, and {_SAVE}"
# First bytes -> (what it is, what to do).
_MAGIC = {
    b"version https://git-lfs": ("a git-LFS pointer and not the file itself", "fetch it with `git lfs pull`"),
    b"/annex/objects/": ("a git-annex pointer and not the file itself", "fetch it with `git annex get`"),
    b"outs:\n": ("a DVC pointer and not the file itself", "fetch it with `dvc pull`"),
    b"# xet version": ("a Xet pointer and not the file itself", "fetch it with `git xet checkout`, or download it"),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", "unpack it and give the checkpoint inside"),
    b"\x04\x22\x4d\x18": ("an LZ4 archive", "unpack it and give the checkpoint inside"),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file, as Keras and TensorFlow write it", _CONVERT),
    b"\x93NUMPY": ("a NumPy array", f"give the checkpoint, or {_SAVE}"),
    b"\x1f\x8b": ("a gzip archive", "unpack it and give the checkpoint inside"),
    b"BZh": ("a bzip2 archive", "unpack it and give the checkpoint inside"),
    b"\xfd7zXZ": ("an xz archive", "unpack it and give the checkpoint inside"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it and give the checkpoint inside"),
    b"Rar!": ("a RAR archive", "unpack it and give the checkpoint inside"),
    b"<!": ("a web page and not the file itself", "download it again, with a login if it needs one"),
    b"<html": ("a web page and not the file itself", "download it again, with a login if it needs one"),
    b"<?xml": ("an XML file and not the checkpoint", "download it again, with a login if it needs one"),
    b"GGUF": ("a GGUF file, which holds a language model", "give the classifier's own checkpoint"),
}
_JOIN = "load them where they were written, and save the state dict into one file"
_PART = re.compile(r"-\d{5}-of-(\d{5})\b")
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def refuse_foreign(path: Path) -> None:
    """Refuses what is no checkpoint file of torch or safetensors, by its right name.

    Raises:
        VITaskError: what it is, and what to do.
    """
    if path.is_dir():
        raise VITaskError(f"checkpoint {str(path)!r} is {_folder(path)}")
    if not path.is_file():
        raise VITaskError(f"checkpoint {str(path)!r} does not exist; check the path")
    found = _foreign(path)
    if found is not None:
        raise VITaskError(f"checkpoint {str(path)!r} is {found[0]}; {found[1]}")


def load(path: Path) -> Any:
    """What a checkpoint file holds, by its content and not its name; read with `weights_only=True`.

    Raises:
        VITaskError: if the file is absent, of another kind, damaged, or would run code when loaded.
    """
    try:
        refuse_foreign(path)
        return _read(path)
    except VITaskError:
        raise
    except Exception as error:  # changed bytes make zip, pickle and torch fail in many ways
        what = f"is damaged ({_reason(error)}); copy it again"
        if "magic number" in str(error):
            what = f"is a pickle that torch.save did not write, or damaged; {_SAVE}, or copy it again"
        raise VITaskError(f"checkpoint {str(path)!r} {what}") from None


def _reason(error: Exception) -> str:
    """The first sentence of an error, without torch's advice to load the file whatever code it runs."""
    said = (str(error).splitlines() or [""])[0].partition(". ")[0][:200]
    return said if said and "weights_only" not in said and "Weights only" not in said else type(error).__name__


def _read(path: Path) -> Any:
    if _is_safetensors(path) or (path.suffix == ".safetensors" and not _is_pickled(path)):
        return load_file(path)
    try:
        # Not by its name, from which torch would take it for another kind.
        with torch.serialization.safe_globals(_harmless()), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise VITaskError(_refused(path, error)) from None


def _harmless() -> list[Any]:
    """Plain values that training scripts store beside the weights: arguments, paths, times, figures from NumPy.

    A path stays what it says, also one of Windows or of a later Python, whose class is not here or has another name.
    """
    import argparse
    import collections
    import datetime
    import pathlib
    import types

    import numpy as np

    kinds = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "c16", "c8", "?", "U1", "S1")
    dtypes = [type(np.dtype(name)) for name in kinds]
    # NumPy moved these functions; either name is in files.
    made = {"scalar": np.float64(0).__reduce__()[0], "_reconstruct": np.zeros(1).__reduce__()[0]}
    names = [(made[name], f"numpy.{core}.multiarray.{name}") for name in made for core in ("core", "_core")]
    for module in ("pathlib", "pathlib._local"):
        names += [(pathlib.PurePosixPath, f"{module}.PosixPath"), (pathlib.PureWindowsPath, f"{module}.WindowsPath")]
        names += [(pathlib.PurePosixPath, f"{module}.PurePosixPath")]
        names += [(pathlib.PureWindowsPath, f"{module}.PureWindowsPath")]
    times = [datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone]
    plain = [dict, list, int, float, str, frozenset, range, collections.defaultdict]
    return [*plain, argparse.Namespace, types.SimpleNamespace, *times, np.ndarray, np.dtype, *dtypes, *names]


def _refused(path: Path, error: Exception) -> str:
    """The sentence for a file that `weights_only=True` does not load."""
    found = _globals(path)
    if not found:
        what = f"is damaged, or no torch checkpoint of weights ({_reason(error)})"
        return f"checkpoint {str(path)!r} {what}; copy it again, or {_SAVE}"
    listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    if _is_module(path):
        what = f"is a whole module that was pickled, with its code's names ({listed})"
    else:
        what = f"holds more than weights ({listed})"
    return f"checkpoint {str(path)!r} {what}, and would run code when loaded; {_SAVE}, best as .safetensors"


def _is_module(path: Path) -> bool:
    """Whether a module was pickled: its attributes have names that no state dict has."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    else:
        pickled = path.read_bytes()
    return b"_modules" in pickled and b"_parameters" in pickled


def _globals(path: Path) -> list[str]:
    """Names that unpickling would import beyond what is harmless; read without running anything."""
    try:
        with torch.serialization.safe_globals(_harmless()):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return _pickled_names(path)


def _pickled_names(path: Path) -> list[str]:
    """The same for a pickle outside a zip archive, as torch before 1.6 and plain `pickle.dump` write it."""
    import pickletools

    found: set[str] = set()
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for _ in range(5):  # torch's old format is a row of pickles
                for code, value, _ in pickletools.genops(file):
                    if code.name == "GLOBAL":
                        found.add(str(value).replace(" ", "."))
                    elif code.name == "STACK_GLOBAL" and len(texts) > 1:
                        found.add(".".join(texts[-2:]))
                    elif isinstance(value, str):
                        texts.append(value)
    except Exception:
        pass
    known = ("torch._utils.", "torch.FloatStorage", "torch.LongStorage", "torch.HalfStorage", "collections.")
    return sorted(name for name in found if not name.startswith(known))


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and 2 <= length <= path.stat().st_size - 8


def _is_pickled(path: Path) -> bool:
    """Whether a file starts as those of `torch.save` and `pickle.dump` do."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def _foreign(path: Path) -> tuple[str, str] | None:
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "empty", "copy or download it again"
    parts = _PART.search(path.name)
    if parts is not None and int(parts[1]) > 1:
        return f"one of {int(parts[1])} files that hold the weights together", _JOIN
    if _is_safetensors(path):
        return None
    for magic, found in _MAGIC.items():
        if start.lstrip(b" \r\n\t\xef\xbb\xbf").startswith(magic):
            return found
    if start[257:262] == b"ustar" and not zipfile.is_zipfile(path):
        return "a tar archive", "unpack it and give the checkpoint inside"
    if start[4:8] == b"TFL3":
        return "a TensorFlow Lite model", _CONVERT
    if path.suffix == ".onnx" or (start[:1] == b"\x08" and (b"pytorch" in start[:64] or b"onnx" in start[:64])):
        return "an ONNX graph, which has no state dict", f"use the model that it was exported from, and {_SAVE}"
    if path.suffix in (".msgpack", ".pb", ".index") or ".data-00000-of-" in path.name:
        return "of TensorFlow or Flax and not of torch", _CONVERT
    if path.name.endswith(".index.json"):
        return "the index of weights that lie in several files", _JOIN
    text = _text(start)
    if text:
        return f"a text file that begins {text!r}", "copy or download the checkpoint itself"
    return _archive(path) if zipfile.is_zipfile(path) else None


def _text(start: bytes) -> str:
    """The first line of a text, "" where the bytes are none."""
    try:
        text = start[:200].decode("utf-8")
    except UnicodeDecodeError:
        return ""
    readable = all(char.isprintable() or char.isspace() for char in text)
    return text.strip().splitlines()[0][:60] if readable and text.strip() else ""


def _archive(path: Path) -> tuple[str, str] | None:
    """What a zip archive is; None for torch's own format."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last and any("/code/" in name for name in names):
        save = f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
        return "a TorchScript archive (a program with its weights)", f"save the weights alone: {save}"
    if "archive_format" in last and "model.json" in last:
        save = f"torch.save(torch.export.load({path.name!r}).state_dict, 'weights.pth')"
        return "a program of torch.export (with its weights)", f"save the weights alone: {save}"
    if "data.pkl" in last:
        return None
    if "model.weights.h5" in last:
        return "a Keras model", _CONVERT
    if names and all(name.endswith(".npy") for name in names):
        return "an archive of NumPy arrays", _CONVERT
    inside = [name for name in names if name.endswith((*WEIGHTS, "data.pkl"))]
    hint = f" ({inside[0]!r})" if inside else f" (it holds {', '.join(map(repr, names[:3])) or 'nothing'})"
    return "a zip of files", f"unpack it and give the checkpoint inside{hint}"


def _folder(path: Path) -> str:
    config = path / "config.json"
    weights = sorted(file for file in path.iterdir() if file.suffix in WEIGHTS and file.is_file())
    if config.is_file():
        record = read_json(config, "configuration")
        record = record if isinstance(record, Mapping) else {}
        if "pretrained_cfg" in record or "architecture" in record:
            inside = str(weights[0]) if weights else f"{path}/model.safetensors"
            return (
                f"a Hugging Face folder of the timm model {record.get('architecture')!r}; give --arch "
                f"{record.get('architecture')} --checkpoint {inside}"
            )
        if "model_type" in record or "architectures" in record:
            return (
                f"a Hugging Face folder of transformers' {record.get('model_type')!r}, whose weights have other names "
                "than timm's; give --module with a factory that returns AutoModelForImageClassification."
                f"from_pretrained({str(path)!r})"
            )
    if (path / "saved_model.pb").is_file():
        return f"a TensorFlow SavedModel; {_CONVERT}"
    if (path / "data.pkl").is_file():
        return "an unpacked torch checkpoint; zip the folder again, or copy the file that it came from"
    if (path / "tsm.json").is_file():
        return "a TSM already; use it as --tsm"
    if any(path.glob("*.distcp")) or any(path.glob("**/*model_states.pt")):
        return (
            "a sharded checkpoint of DeepSpeed or torch.distributed; gather it into one file, for instance with "
            "zero_to_fp32.py"
        )
    if any(path.glob("*.index.json")) or any(_PART.search(file.name) for file in weights):
        return f"a folder with the weights in several files; {_JOIN}"
    inside = f" ({weights[0].name!r})" if weights else ""
    return f"a folder; give the checkpoint file inside{inside}"
