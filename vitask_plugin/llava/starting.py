"""What a VITask run starts from: the TSM's features, a connector, and what the earlier stage taught the LLM."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.connector import LEARNED, ExemplarConnector, LearnedPrefix, build_connector
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import checkpoint
from vitask_plugin.llava.batch import VITaskDataset
from vitask_plugin.tsm.features import FeatureStore, extract
from vitask_plugin.tsm.joint import Tasks

logger = logging.getLogger(__name__)


def features_directory(vitask: VITaskArguments, output_dir: str) -> Path:
    """Where the features are: where the flags say, or in the output folder, to be extracted."""
    return Path(vitask.vitask_features or Path(output_dir) / "vitask_features")


def extract_features(vitask: VITaskArguments, dataset: VITaskDataset, output_dir: str) -> None:
    """Extracts the features if only a TSM is given, and no earlier start has done so."""
    directory = features_directory(vitask, output_dir)
    if vitask.vitask_features is None and not directory.exists():
        logger.info("extracting TSM features into %s", directory)
        extract(
            vitask.vitask_tsm,
            [dataset.data_path],
            dataset.data_args.image_folder,
            directory,
            tokens=vitask.exemplar_tokens,
            device="cuda" if torch.cuda.is_available() else "cpu",
            trust_code=vitask.vitask_trust_tsm_code,
        )


def open_features(vitask: VITaskArguments, output_dir: str) -> tuple[FeatureStore, Tasks]:
    """The feature store, checked against TSM and flags, and the TSM's tasks: none where only features are given."""
    directory = features_directory(vitask, output_dir)
    store = FeatureStore.open(directory)
    tasks: Tasks = {}
    if vitask.vitask_tsm is not None:
        from vitask_plugin.tsm.model import TSM

        tsm = TSM.load(vitask.vitask_tsm, trust_code=vitask.vitask_trust_tsm_code)
        store.check_tsm(tsm.hash)
        tasks = tsm.record["tasks"]
    if vitask.vitask_ep == "text":
        return store, tasks  # its logits are used, which every store has
    if store.tokens != vitask.exemplar_tokens:
        raise VITaskError(
            f"features {str(directory)!r} hold {store.tokens!r} tokens, --vitask_ep {vitask.vitask_ep} needs "
            f"{vitask.exemplar_tokens!r}; extract them with `vitask tsm extract --tokens {vitask.exemplar_tokens}`"
        )
    return store, tasks


def make_connector(
    vitask: VITaskArguments, store: FeatureStore | None, model: nn.Module, args: Any
) -> ExemplarConnector | LearnedPrefix:
    """A new connector, or the earlier stage's; frozen in stage 2. Without a store: the learned prefix."""
    width = model.config.hidden_size
    kind, features = (LEARNED, 0) if store is None else (vitask.vitask_connector, store.width)
    if vitask.vitask_connector_path is None:
        # Its own generator: the weights must not depend on what was built before it, such as a TSM.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            connector = build_connector(kind, features, width)
    else:
        connector = checkpoint.load_connector(vitask.vitask_connector_path)
        _check_earlier_stage(vitask, store, connector, width)
        if store is not None:
            vitask.vitask_connector = connector.kind
    if is_deepspeed_zero3_enabled():
        connector.to(model.dtype)  # ZeRO-3 gathers parameters of one dtype
    connector.requires_grad_(vitask.vitask_stage == 1)
    return connector.to(args.device)


def _check_earlier_stage(
    vitask: VITaskArguments, store: FeatureStore | None, connector: ExemplarConnector | LearnedPrefix, width: int
) -> None:
    path = vitask.vitask_connector_path
    record = checkpoint.read_record(path)
    if record is None or record["connector"] is None:
        raise VITaskError(f"{path!r} holds a connector but no {checkpoint.RECORD_FILE} of it; copy both")
    if record["ep"] != vitask.vitask_ep:
        raise VITaskError(
            f"the connector in {path!r} was trained with --vitask_ep {record['ep']}, this run has --vitask_ep "
            f"{vitask.vitask_ep}; use the same in both stages"
        )
    features = 0 if store is None else store.width
    if (connector.in_features, connector.out_features) != (features, width):
        raise VITaskError(
            f"the connector in {path!r} maps {connector.in_features} to {connector.out_features}, but the TSM's "
            f"features are {features} wide and the LLM {width}; use the TSM and the model of the earlier stage"
        )
    trained = store and record["tsm"]["hash"]
    if store is not None and trained != store.tsm_hash:
        raise VITaskError(
            f"the connector in {path!r} was trained with TSM {trained[:12]}, the features are of TSM "
            f"{store.tsm_hash[:12]}; use the same TSM in both stages"
        )


def continue_stage(model: nn.Module, start: str, earlier: str, lora: bool) -> None:
    """The LLM goes on from the earlier stage too: from its adapter, or by starting from its folder.

    Args:
        start: --model_name_or_path. earlier: --vitask_connector_path.
    """
    started_there = Path(start).resolve() == Path(earlier).resolve()
    if checkpoint.has_adapter(earlier) and lora:
        checkpoint.continue_adapter(model, earlier)
    elif checkpoint.has_adapter(earlier):
        raise VITaskError(
            f"{earlier!r} is the output of a LoRA run, and without --lora_enable True its adapter would be lost; "
            f"enable it, or merge it and put {checkpoint.CONNECTOR_FILE} and {checkpoint.RECORD_FILE} beside the result"
        )
    elif not started_there:
        raise VITaskError(
            f"--vitask_connector_path {earlier!r} holds a whole model, but --model_name_or_path {start!r} starts from "
            "another, which would lose what the earlier stage taught; give the same folder for both"
        )
