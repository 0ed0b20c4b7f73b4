"""What a VITask run starts from: the TSM's features, a connector, and what the earlier stage taught the LLM."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from vitask_plugin import model_folder
from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.contents import Contents, survey
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import digest_of
from vitask_plugin.method.connector import LEARNED, ExemplarConnector, LearnedPrefix, build_connector
from vitask_plugin.record import checkpoint, connector_file
from vitask_plugin.training.peers import Peers, node_share, world_share
from vitask_plugin.training.samples import TaskSamples
from vitask_plugin.tsm.extraction import Extraction
from vitask_plugin.tsm.features import FeatureStore
from vitask_plugin.tsm.joint import Tasks
from vitask_plugin.tsm.shards import CONTENTS_FILE

logger = logging.getLogger(__name__)

IMAGES_FOLDER = "vitask_images"  # in the output folder: what is in the images, for the other processes and a restart
LOOK = 100_000  # images between two times that it is written


def features_directory(vitask: VITaskArguments, output_dir: str) -> Path:
    """Where the features are: where the flags say, or in the output folder, to be extracted."""
    return Path(vitask.vitask_features or Path(output_dir) / "vitask_features")


def extract_features(vitask: VITaskArguments, dataset: TaskSamples, args: Any) -> None:
    """Extracts the features if only a TSM is given, and no earlier start has done so. All ranks have to call it.

    Each rank extracts a part, on its own device; a start that was killed is resumed. Nobody waits in a collective.

    Args:
        args: the training arguments.
    """
    if vitask.vitask_features is not None:
        return
    with Peers() as peers:
        directory = features_directory(vitask, args.output_dir)
        if directory.exists():
            _check_dtype(FeatureStore.open(directory), vitask)
            return
        logger.info("extracting TSM features into %s", directory)
        extraction = Extraction(
            vitask.vitask_tsm,
            dataset.task_images(),
            dataset.image_folder,
            directory,
            tokens=vitask.exemplar_tokens,
            dtype=vitask.vitask_features_dtype,
            workers=args.dataloader_num_workers,
            device=str(args.device),
            trust_code=vitask.vitask_trust_tsm_code,
        )
        # Nodes with a disk of their own, each of which saves, have all of it to do.
        extraction.check_images(dataset.seen)
        extraction.compute(node_share() if args.save_on_each_node else world_share(), peers.check)
        peers.wait()
        if args.should_save:
            extraction.finish()


def _check_dtype(store: FeatureStore, vitask: VITaskArguments) -> None:
    """Refuses features of an earlier start that are stored as another dtype than this one asks for."""
    if store.dtype != vitask.vitask_features_dtype:
        raise VITaskError(
            f"features {str(store.directory)!r} of an earlier start are {store.dtype}, and --vitask_features_dtype is "
            f"{vitask.vitask_features_dtype}; give {store.dtype}, or delete the folder to have them extracted again"
        )


def see_images(vitask: VITaskArguments, dataset: TaskSamples, args: Any) -> Contents:
    """What is in every image, its content too where a TSM has looked at it. All ranks have to call it.

    The ranks of a node look at a share each, and hand it to the others in `IMAGES_FOLDER` of the output; what an
    earlier start or the extraction has read is not read again, as long as size and time of the file are the same.
    """
    images, hashed = dataset.images(), frozenset(dataset.task_images() if vitask.uses_tsm else ())
    (local, count), (rank, _) = node_share(), world_share()
    folder = Path(args.output_dir) / IMAGES_FOLDER
    # Ranks that were given another image folder have nothing to do with each other's findings.
    place = digest_of(os.path.realpath(dataset.image_folder))[:12]
    shares = [folder / f"rank-{rank - local + other}-{place}.npz" for other in range(count)]
    own, of_node = shares[local], folder / f"node-{rank - local}-{place}.npz"
    with Peers() as peers:
        stored = [features_directory(vitask, args.output_dir) / CONTENTS_FILE] if vitask.uses_tsm else []
        known = [Contents.open(path) for path in (*stored, of_node, own)]
        contents = Contents.of({})
        mine = images[local::count]
        for start in range(0, len(mine), LOOK):
            found = survey(dataset.image_folder, mine[start : start + LOOK], hashed, known)
            contents = Contents.joined([contents, found])
            contents.save(own)
            peers.check()
        peers.wait()
        if count > 1:
            contents = Contents.joined(map(Contents.open, shares))
        peers.wait()
        if not all(image in contents for image in images):  # or a launcher that counts processes in another way
            contents = survey(dataset.image_folder, images, hashed, known)
        if local == 0:
            contents.save(of_node)
        own.unlink(missing_ok=True)
    return contents


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


def find_connector(vitask: VITaskArguments, model: str | None) -> None:
    """Stage 2 starts from a connector: the one named, or the one beside the model."""
    if not vitask.uses_connector or vitask.vitask_stage == 1:
        return
    if vitask.vitask_connector_path is None:
        vitask.vitask_connector_path = model
    if not connector_file.has_connector(vitask.vitask_connector_path):
        raise VITaskError(
            f"--vitask_stage 2 needs a stage-1 connector, and {vitask.vitask_connector_path!r} holds no "
            f"{model_folder.CONNECTOR_FILE}; give --vitask_connector_path STAGE1_OUTPUT_DIR"
        )


def make_connector(
    vitask: VITaskArguments, store: FeatureStore | None, width: int, dtype: torch.dtype, args: Any
) -> ExemplarConnector | LearnedPrefix:
    """A new connector, or the earlier stage's; frozen in stage 2. Without a store: the learned prefix.

    Args:
        width: D of the language model. dtype: of its weights.
    """
    kind, features = (LEARNED, 0) if store is None else (vitask.vitask_connector, store.width)
    if vitask.vitask_connector_path is None:
        # Its own generator: the weights must not depend on what was built before it, such as a TSM.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            connector = build_connector(kind, features, width)
    else:
        connector = connector_file.load_connector(vitask.vitask_connector_path)
        _check_earlier_stage(vitask, store, connector, width)
        if store is not None:
            vitask.vitask_connector = connector.kind
    if is_deepspeed_zero3_enabled():
        connector.to(dtype)  # ZeRO-3 gathers parameters of one dtype
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
    if store is not None and record["tsm"] is None:
        raise VITaskError(
            f"the {checkpoint.RECORD_FILE} in {path!r} names no TSM beside its connector; copy both again"
        )
    trained = store and record["tsm"]["hash"]
    if store is not None and trained != store.tsm_hash:
        raise VITaskError(
            f"the connector in {path!r} was trained with TSM {trained[:12]}, the features are of TSM "
            f"{store.tsm_hash[:12]}; use the same TSM in both stages"
        )
