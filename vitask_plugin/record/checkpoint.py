"""VITask checkpoints: a stock LLaVA checkpoint, and beside it the connector and `vitask.json`.

OUTPUT_DIR/                      what upstream writes: full weights, or adapter + non_lora_trainables.bin
    vitask_connector.safetensors the exemplar connector, or the learned prefix
    vitask.json                  flags, TSM identity and width, label sets, versions; some weights of an adapter's base

`vitask connector align` and `fit` write the last two alone, for another TSM: a folder that names its checkpoint.
"""

import hashlib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.comparison import Seen
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file, write_json
from vitask_plugin.model_folder import CONNECTOR_FILE
from vitask_plugin.record.record_format import FORMAT, RECORD

RECORD_FILE = "vitask.json"
BASE = "base"  # key of vitask.json: see `record.base`
RUN = "run"  # key of vitask.json: what resuming from a checkpoint depends on
FILES = "files"  # the same, of a checkpoint: `{path in it: bytes}`
_RECORDED_PACKAGES = ("vitask-plugin", "llava-torch", "torch", "transformers", "peft", "timm", "deepspeed")


# Writing -------------------------------------------------------------------------------------------------------


def versions(packages: Iterable[str] = _RECORDED_PACKAGES) -> dict[str, str]:
    """`{package: version}` of those that are installed; by default of the packages a checkpoint depends on."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def save_record(
    directory: str | Path,
    arguments: VITaskArguments,
    connector: Any,
    tsm: dict[str, Any] | None,
    tasks: dict[str, dict[str, Any]],
    version: str,
    fitted: dict[str, Any] | None = None,
    run: dict[str, Any] | None = None,
    images: dict[str, Any] | None = None,
    questions: dict[str, Any] | None = None,
    base: dict[str, str] | None = None,
) -> None:
    """Writes `vitask.json`, after the connector's file.

    Args:
        version: upstream's --version, the conversation template.
        tsm: {"hash", "width"} of the TSM whose features were trained on, None without one.
        tasks: {task: {"choices": [str], ...}} of the training data.
        fitted: of `vitask connector align` and `fit`: which checkpoint the connector belongs to, and how it went.
        run: of training: what resuming from the folder depends on, see `resuming.run_of`.
        images: of training: what the images of each task are, see `data.preparation`.
        questions: of training: how each task is asked, see `data.questions`.
        base: of an adapter: some of the weights it was trained on, see `record.base`.
    """
    shape = connector and {"kind": connector.kind, "in": connector.in_features, "out": connector.out_features}
    if shape is not None:
        shape["sha256"] = sha256_file(Path(directory) / CONNECTOR_FILE)
    record = {
        "format": FORMAT,
        "version": version,
        "arguments": arguments.flags(),
        "ep": arguments.vitask_ep,
        "tsm": tsm,
        "connector": shape,
        "tasks": {task: entry["choices"] for task, entry in tasks.items()},
        "versions": versions(),
    }
    if fitted is not None:
        record["fitted"] = fitted
    if run is not None:
        record[RUN] = run
    if images is not None:
        record["images"] = images
    if questions is not None:
        record["questions"] = questions
    if base is not None:
        record[BASE] = base
    write_json(Path(directory) / RECORD_FILE, record)


# Reading -------------------------------------------------------------------------------------------------------


def read_record(directory: str | Path) -> dict[str, Any] | None:
    """`vitask.json`, or None where there is none.

    Raises:
        VITaskError: unreadable, damaged, or written by a later version.
    """
    path = Path(directory) / RECORD_FILE
    if not path.is_file():
        return None
    return RECORD.read(path, "VITask record")


def trained_on(record: dict[str, Any], directory: str | Path) -> Seen:
    """The images of a checkpoint's training, for `data.comparison.check_prepared`."""
    return Seen(f"checkpoint {str(directory)!r} was trained", record.get("images"), record.get("tasks", {}))


def identity(directory: str | Path) -> str:
    """Hex SHA-256 of what tells one VITask checkpoint from another: its record and its connector."""
    digest = hashlib.sha256()
    for name in (RECORD_FILE, CONNECTOR_FILE):
        digest.update(sha256_file(Path(directory) / name).encode())
    return digest.hexdigest()


def read_fitted(directory: str | Path, path: str | Path) -> dict[str, Any]:
    """The record of the checkpoint `path` with a connector in `directory` that was aligned or fitted to it.

    Its `fitted`, `connector`, `tsm` and `arguments` are those of the connector; its `tasks` are those of both.

    Raises:
        VITaskError: not written by `vitask connector align` or `fit`, or for another checkpoint.
    """
    record, own = read_record(path), read_record(directory)
    if own is None or "fitted" not in own:
        raise VITaskError(
            f"{str(directory)!r} holds no connector that `vitask connector align` or `fit` wrote; give its --out"
        )
    if record is None or not (Path(path) / CONNECTOR_FILE).is_file() or identity(path) != own["fitted"]["identity"]:
        raise VITaskError(
            f"the connector in {str(directory)!r} belongs to checkpoint {own['fitted']['checkpoint']!r}, which "
            f"{str(path)!r} is not; give that one, or align or fit a connector to this one"
        )
    return {**record, **own, "tasks": {**own["tasks"], **record["tasks"]}}
