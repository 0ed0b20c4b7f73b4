"""What training leaves behind, made from random weights: a checkpoint with a connector, and its TSM."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.instructions import DRAWN, LabelSet
from vitask_plugin.files import sha256_file
from vitask_plugin.method.connector import ExemplarConnector


@dataclass(frozen=True)
class Trained:
    """A checkpoint with a connector, and its TSM."""

    checkpoint: Path
    tsm: Path


def make_tsm(
    directory: Path, *, seed: int = 0, image_size: int = 32, name: str = "test_vit", labels: LabelSet = DRAWN
) -> Any:
    from vitask_plugin.tsm.backbone import build_network, timm_options
    from vitask_plugin.tsm.model import TSM

    torch.manual_seed(seed)
    source = {"timm": name, "options": timm_options(name, len(labels.choices), image_size)}
    tasks = {labels.task: {"choices": list(labels.choices), "multi_label": False}}
    record = {"source": source, "image_size": image_size, "mean": [0.5] * 3, "std": [0.5] * 3, "tasks": tasks}
    tsm = TSM(build_network(source, len(labels.choices)), record)
    tsm.save(directory)
    return tsm


def make_trained(directory: Path, plain: Path, ep: str, labels: LabelSet = DRAWN) -> Trained:
    """What training leaves behind, with random weights: the stock checkpoint, a connector and the record."""
    from vitask_plugin.record import checkpoint, connector_file

    tsm = make_tsm(directory / "tsm", labels=labels)
    width = tsm.record["feature_width" if ep == "cls" else "patch_width"]
    torch.manual_seed(1)
    connector = ExemplarConnector("mlp2x_gelu", width, 64)
    target = shutil.copytree(plain, directory / "llava-vitask")
    arguments = VITaskArguments(vitask=True, vitask_ep=ep, vitask_tsm="tsm")
    connector_file.save_connector(connector, connector.state_dict(), target)
    identity = {"hash": tsm.hash, "width": width}
    checkpoint.save_record(target, arguments, connector, identity, tsm.record["tasks"], version="v1")
    return Trained(target, directory / "tsm")


def replace_connector(folder: Path, connector: Any, weights: dict[str, torch.Tensor]) -> None:
    """Other weights of the same connector into a checkpoint, as if it had been trained to them."""
    from vitask_plugin.record import connector_file

    connector_file.save_connector(connector, weights, folder)
    record_connector(folder)


def record_connector(folder: Path) -> None:
    """Makes the connector's file in a checkpoint the one of its record."""
    path = folder / "vitask.json"
    record = json.loads(path.read_text())
    record["connector"]["sha256"] = sha256_file(folder / "vitask_connector.safetensors")
    path.write_text(json.dumps(record))
