"""What a checkpoint or a TSM says of its own training: the seed, and everything else, so that two can be compared.

    vitask.json           flags, data, schedule, TSM, label sets, versions      training with --vitask
    training_args.bin     transformers' and the host's own arguments            any training that saved full weights
    config.json           which network                                         any checkpoint
    adapter_config.json   which adapter                                         LoRA
    trainer_state.json    how many steps                                        any training
    tsm.json, metrics.json                                                      a TSM

No file but vitask.json and metrics.json tells the data: without them the steps and the base's name stand in for it.
Places, and what only a log or a disk sees, are no difference between two trainings.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitask_plugin.formats.json_text import read_json
from vitask_plugin.model_folder import ADAPTER_CONFIG_FILE, CONFIG_FILE
from vitask_plugin.record.checkpoint import RECORD_FILE, RUN, read_record
from vitask_plugin.tsm import model as tsm_model

ARGUMENTS_FILE = "training_args.bin"
STATE_FILE = "trainer_state.json"
# Flags of vitask.json that say where something lies, or what is looked at before the first step.
_PLACES = (
    *("vitask_tsm", "vitask_features", "vitask_connector_path", "vitask_check_images", "vitask_trust_tsm_code"),
    "vitask_features_dtype",
)
# The same of transformers' and LLaVA's arguments, and what is written, logged or shown.
_QUIET = (
    *("output_dir", "run_name", "project", "seed", "data_seed", "local_rank", "resume_from_checkpoint", "report_to"),
    *("cache_dir", "disable_tqdm", "distributed_state", "dataloader_num_workers", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "lora_weight_path"),
)
_QUIET_BEGINNINGS = ("_", "log", "hub_", "push_to_hub", "trackio_", "save_", "vitask", "overwrite_output")
# Of the files of a network and an adapter.
_NAMES = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version", "use_cache", "revision")
_TSM_QUIET = ("seed", "workers", "device")
_SHOWN = 40  # characters of a value

Settings = Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """One training.

    Attributes:
        seed: None where no file tells.
        settings: {file: {name: value}} of everything else. A file that is not there is not in it.
    """

    seed: int | None
    settings: Mapping[str, Settings]


def read_origin(folder: Path, tsm: Path | None = None, connector: Path | None = None) -> Origin | None:
    """What is known of the training of a checkpoint or a TSM; None where nothing is.

    Args:
        tsm: where a checkpoint's TSM lies now, if its own record no longer says so.
        connector: a folder with another connector for it, aligned or fitted.

    Raises:
        VITaskError: a record that cannot be read.
    """
    if (folder / tsm_model.RECORD_FILE).is_file():
        return _tsm_origin(folder)
    settings: dict[str, Settings] = {}
    seed = None
    for name, ignored in ((CONFIG_FILE, _NAMES), (ADAPTER_CONFIG_FILE, _NAMES)):
        if (folder / name).is_file():
            found = read_json(folder / name, "model configuration")
            settings[name] = _texts(found, ignored) if isinstance(found, dict) else {}
    arguments = _training_arguments(folder)
    if arguments is not None:
        seed = arguments.get("seed")
        settings[ARGUMENTS_FILE] = _texts(arguments, _QUIET, _QUIET_BEGINNINGS)
    record = read_record(folder)
    if record is None:
        settings |= _begun_from(folder, seed)
    else:
        seed = record.get(RUN, {}).get("seed", seed)
        settings[RECORD_FILE] = _of_record(record, tsm)
    other = None if connector is None else read_record(connector)
    if other is not None:
        settings["connector"] = _of_record(other, tsm)
    return Origin(seed if isinstance(seed, int) else None, settings) if settings else None


def _begun_from(folder: Path, seed: Any) -> dict[str, Settings]:
    """The steps of a training, and the model that was tuned: by its name, in which its own seed may stand."""
    found: dict[str, Settings] = {}
    for place in _places(folder):
        if (place / STATE_FILE).is_file():
            state = read_json(place / STATE_FILE, "training log")
            if isinstance(state, dict) and "max_steps" in state:
                found[STATE_FILE] = _texts({"max_steps": state["max_steps"]}, ())
            break
    for file, key in ((ADAPTER_CONFIG_FILE, "base_model_name_or_path"), (CONFIG_FILE, "_name_or_path")):
        given = read_json(folder / file, "model configuration") if (folder / file).is_file() else None
        base = given.get(key) if isinstance(given, dict) else None
        if isinstance(base, str) and base:
            name = re.sub(rf"(?i)(?<![^\W\d_])s(eed)?[\W_]*{seed}(?!\d)", "seed", Path(base).name)
            found["base"] = {"base model": name}
            break
    return found


def differences(first: Origin, second: Origin) -> list[str]:
    """In what two trainings differ beside their seeds, by the files that both have."""
    found = {}
    if (RECORD_FILE in first.settings) != (RECORD_FILE in second.settings):
        found["--vitask"] = "--vitask " + ("True, not False" if RECORD_FILE in first.settings else "False, not True")
    for file in first.settings.keys() & second.settings.keys():
        one, other = first.settings[file], second.settings[file]
        names = one.keys() | other.keys()
        if "TSM" in names:  # of one side it is only known which it is
            names = {name for name in names if not name.startswith("TSM: ")}
        for name in names:
            values = [_short(side.get(name, "none")) for side in (one, other)]
            if one.get(name) != other.get(name):
                # Several files may hold one and the same setting.
                found[name] = f"{name} {values[0]}, not {values[1]}" if values[0] != values[1] else name
    return [found[name] for name in sorted(found)]


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _texts(found: Mapping[str, Any], ignored: tuple[str, ...], beginnings: tuple[str, ...] = ()) -> Settings:
    return {
        name: _text(value)
        for name, value in found.items()
        if name not in ignored and not name.startswith(beginnings or ("\0",))
    }


def _text(value: Any) -> str:
    if isinstance(value, list):
        # A set that was written as a list, as LoRA's layers are, has another order each time.
        return str(sorted(map(str, value)))
    return json.dumps(value, sort_keys=True, default=str) if isinstance(value, dict) else str(value)


def _of_record(record: Mapping[str, Any], tsm: Path | None) -> Settings:
    run = record.get(RUN, {})
    schedule = run.get("schedule", {})
    found = {
        **{f"--{name}": value for name, value in record["arguments"].items() if name not in _PLACES},
        **{f"--{name}": value for name, value in schedule.items()},
        **{name: value for name, value in run.items() if name not in ("seed", "schedule", "tsm", "save_only_model")},
        "conversation template": record.get("version"),
        "label sets": record.get("tasks"),
        "images": record.get("images"),
        **_tsm_of(record, tsm),
        **record.get("versions", {}),
    }
    fitted = {name: value for name, value in record.get("fitted", {}).items() if name not in ("identity", "checkpoint")}
    return _texts({**found, **({"connector fitted": fitted} if fitted else {})}, ())


def _tsm_of(record: Mapping[str, Any], tsm: Path | None) -> Settings:
    """How the TSM was trained, if it is on this machine: each seed may have one of its own. Else which one it is."""
    if record["tsm"] is None:
        return {}
    named = record["arguments"].get("vitask_tsm")
    for folder in filter(None, (named and Path(named), tsm)):
        is_there = (folder / tsm_model.RECORD_FILE).is_file()
        if is_there and tsm_model.read_tsm_record(folder).get("sha256") == record["tsm"]["hash"]:
            settings = _tsm_origin(folder).settings.values()
            return {f"TSM: {name}": value for one in settings for name, value in one.items()}
    return {"TSM": record["tsm"]["hash"][:12]}


def _tsm_origin(folder: Path) -> Origin:
    record = tsm_model.read_tsm_record(folder)
    kept = ("source", "image_size", "mean", "std", "tasks", "images", "init")
    settings = {tsm_model.RECORD_FILE: _texts({name: record.get(name) for name in kept}, ())}
    seed = None
    if (folder / tsm_model.METRICS_FILE).is_file():
        metrics = read_json(folder / tsm_model.METRICS_FILE, "TSM metrics")
        found = metrics.get("settings") if isinstance(metrics, dict) else None
        if isinstance(found, dict):
            seed = found.get("seed")
            settings[tsm_model.METRICS_FILE] = _texts(found, _TSM_QUIET)
        data = metrics.get("data") if isinstance(metrics, dict) else None
        if isinstance(data, dict):
            settings["data"] = _texts({name: str(digest)[:12] for name, digest in data.items()}, ())
    return Origin(seed if isinstance(seed, int) else None, settings)


# training_args.bin -------------------------------------------------------------------------------------------------


def _training_arguments(folder: Path) -> dict[str, Any] | None:
    """The arguments of a training: of its folder, else of its newest checkpoint; None where there are none, or none
    that can be read."""
    for place in _places(folder):
        if (place / ARGUMENTS_FILE).is_file():
            return _unpickled(place / ARGUMENTS_FILE)
    return None


def _places(folder: Path) -> list[Path]:
    """A training's folder, and its checkpoints, the newest first."""
    steps = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return [folder, *sorted(steps, key=lambda path: -int(path.name.rpartition("-")[2]))]


def _unpickled(path: Path) -> dict[str, Any] | None:
    """The plain values of pickled arguments. No class that the file names is imported: an empty one stands for each."""
    import pickle

    import torch
    from torch import serialization

    try:
        named = serialization.get_unsafe_globals_in_checkpoint(path)
        stand_ins: list[Any] = [(type(name.rpartition(".")[2], (_StandIn,), {}), name) for name in named]
        with serialization.safe_globals(stand_ins):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile):
        return None
    values = {name: _plain(value) for name, value in vars(found).items()} if isinstance(found, _StandIn) else {}
    return {name: value for name, value in values.items() if value is None or isinstance(value, _PLAIN)}


class _StandIn:
    """In place of any class of a pickle: keeps what it is made of, and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values


_PLAIN = (bool, int, float, str, list, dict)


def _plain(value: Any) -> Any:
    """A choice, such as an optimizer's name, is pickled as the call of its class with that name."""
    if isinstance(value, _StandIn) and len(getattr(value, "values", ())) == 1:
        return value.values[0]
    return value
