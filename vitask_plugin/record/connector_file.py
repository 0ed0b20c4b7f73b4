"""The connector of a checkpoint, in a file of its own beside the weights."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from vitask_plugin.arguments import CONNECTOR_KINDS
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path, sha256_file
from vitask_plugin.method.connector import LEARNED, ExemplarConnector, LearnedPrefix, build_connector
from vitask_plugin.model_folder import CONNECTOR_FILE
from vitask_plugin.reading import readable
from vitask_plugin.record.checkpoint import RECORD_FILE, read_record

CONNECTOR_NAME = "vitask_connector"  # of the module in a model


def save_connector(
    connector: ExemplarConnector | LearnedPrefix, weights: dict[str, Tensor], directory: str | Path
) -> None:
    """Writes the connector's `weights` (its state dict, gathered by the caller) atomically.

    Raises:
        VITaskError: weights that are not those of the connector, such as what ZeRO-3 leaves of them on one rank.
    """
    expected = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in connector.named_parameters()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        raise VITaskError(
            f"{CONNECTOR_FILE} is not written into {str(directory)!r}: its weights should be {expected}, not {found}; "
            "gather them first"
        )
    metadata = {"kind": connector.kind, "in": str(connector.in_features), "out": str(connector.out_features)}
    with atomic_path(Path(directory) / CONNECTOR_FILE) as temporary:
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
            temporary,
            metadata,
        )


def load_connector(directory: str | Path) -> ExemplarConnector | LearnedPrefix:
    """The connector of a checkpoint, float32.

    Raises:
        VITaskError: absent, truncated, not a connector, or not the one that `vitask.json` was written with.
    """
    path = Path(directory) / CONNECTOR_FILE
    if not path.is_file():
        raise VITaskError(f"{str(directory)!r} holds no {CONNECTOR_FILE}; give the output folder of a VITask stage")
    with readable("connector", path), safetensors.safe_open(path, "pt") as file:
        shape = file.metadata() or {}
        if shape["kind"] not in (*CONNECTOR_KINDS, LEARNED):
            raise ValueError(f"its kind is {shape['kind']!r}")
        # Its first weights are drawn and overwritten: the draws of a run that loads it stay what they are.
        with torch.random.fork_rng(devices=[]):
            connector = build_connector(shape["kind"], int(shape["in"]), int(shape["out"]))
        connector.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
        if not all(weight.isfinite().all() for weight in connector.parameters()):
            raise ValueError("it holds numbers that are infinite or none, as a run that diverged leaves them")
    _check_recorded(path)
    return connector


def _check_recorded(path: Path) -> None:
    """Refuses a connector that is not the one of the record beside it; early records do not say which that is."""
    recorded = ((read_record(path.parent) or {}).get("connector") or {}).get("sha256")
    found = sha256_file(path)
    if recorded not in (None, found):
        raise VITaskError(
            f"connector {str(path)!r} is not the one that {str(path.with_name(RECORD_FILE))!r} was written with (hash "
            f"{found[:12]}, recorded {recorded[:12]}); copy both from one folder again"
        )


def has_connector(directory: str | Path | None) -> bool:
    return directory is not None and (Path(directory) / CONNECTOR_FILE).is_file()
