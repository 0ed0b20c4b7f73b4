"""`vitask connector align`: another TSM for a tuned VLM, by a regression instead of a training.

Both TSMs look at the same images, which need no labels. What the old one says is predicted from what the new one
says, and that prediction becomes part of the connector (`method/alignment.py`). The VLM is neither loaded nor changed.
Written are the connector and `vitask.json`, which names the checkpoint, as `vitask connector fit` writes them.
"""

import argparse
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vitask_plugin import model_folder
from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.comparison import Seen, check_all
from vitask_plugin.data.images import decode, read_bytes
from vitask_plugin.data.preparation import prepared
from vitask_plugin.data.sizes import measured
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_folder, check_replaceable, inside
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.method.alignment import Found, Moments, align, fold
from vitask_plugin.record import checkpoint, connector_file
from vitask_plugin.tsm.device import as_device, memory_error_as
from vitask_plugin.tsm.features import FeatureStore, add_flags
from vitask_plugin.tsm.model import TSM

FOLDS = 5  # each image is predicted once, from the other four fifths
MINIMUM = 2 * FOLDS  # images
BUFFER = 4096  # tokens of a fold that are summed up at once
# R2 from which on the words of `expectation` hold; from trials on the validation images of the drawn data, in which
# R2 .58 kept the accuracy with EP, .35 lost .02-.05 or came near the new TSM's own, and below .2 most of it was lost.
GOOD, FAIR = 0.4, 0.2


class Side:
    """The features of one TSM: computed by it, or read from what `vitask tsm extract` wrote.

    Args:
        source: of either kind, found in `folder`. tokens: `cls` or `all`.

    Attributes:
        hash: of the TSM. length: tokens per image (E). width: of a token (F).
    """

    def __init__(self, source: TSM | FeatureStore, folder: str | Path, tokens: str) -> None:
        self.source, self.tokens = source, tokens
        if isinstance(source, FeatureStore):
            if source.tokens != tokens:
                raise VITaskError(
                    f"features {str(folder)!r} hold {source.tokens!r} tokens, the checkpoint's exemplars are made of "
                    f"{tokens!r}; extract them with `vitask tsm extract --tokens {tokens}`"
                )
            self.hash, self.length, self.width = source.tsm_hash, source.length, source.width
        else:
            source.check_tokens(tokens)
            record, of_patches = source.record, tokens == "all"
            self.hash, self.length = source.hash, record["patch_count"] if of_patches else 1
            self.width = record["patch_width" if of_patches else "feature_width"]

    @property
    def reader(self) -> Any:
        """What a worker process needs of it: the store, or how the TSM wants its pixels."""
        return self.source if isinstance(self.source, FeatureStore) else self.source.preprocessing()

    def features(self, read: Tensor) -> Tensor:
        """What the reader gave for a batch -> features [B, E, F]."""
        if isinstance(self.source, FeatureStore):
            return read
        return self.source.tokens(self.source(read.to(self.source.device)), self.tokens).cpu()


class _Images(Dataset):
    """Row -> (SHA-256 of the file, what each side reads of it), or a sentence: an error must leave a worker as one."""

    def __init__(self, sides: tuple[Side, Side], folder: str | Path, images: list[str]) -> None:
        self.readers, self.folder, self.images = [side.reader for side in sides], folder, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, list[Tensor]] | str:
        name = self.images[index]
        try:
            path = inside(self.folder, name)
            data = read_bytes(path)
            sha256, picture = hashlib.sha256(data).hexdigest(), decode(data, path)
            return sha256, [
                reader.get(name, sha256) if isinstance(reader, FeatureStore) else reader(picture)
                for reader in self.readers
            ]
        except VITaskError as error:
            return str(error)


def _collate(items: list[Any]) -> tuple[list[str], list[Tensor]] | str:
    for item in items:
        if isinstance(item, str):
            return item
    hashes, read = zip(*items, strict=True)
    return list(hashes), [torch.stack(one) for one in zip(*read, strict=True)]


def align_connector(
    path: str | Path,
    data: str | Path,
    image_folder: str | Path,
    output: str | Path,
    *,
    old: str | Path | None = None,
    new: str | Path | None = None,
    old_features: str | Path | None = None,
    new_features: str | Path | None = None,
    connector: str | Path | None = None,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "auto",
    trust_code: bool = False,
    any_image_size: bool = False,
) -> dict[str, Any]:
    """Writes a connector to `output` that makes of the new TSM's features what the old one's were made into.

    Args:
        path: a VITask checkpoint that was trained with exemplars of TSM features; its weights are not read.
        data: LLaVA JSON; only its `image` is needed. image_folder: what its image paths are relative to.
        old, new: folders of the TSMs; or of their features, as `vitask tsm extract` wrote them.
        connector: an output of this command or of `connector fit` to start from, in place of the checkpoint's own.
        batch_size: images per forward. workers: processes that read images; 0 = this one.
        trust_code: see `TSM.load`.
        any_image_size: go on if the images are of another size, or prepared in another way, than those of training.

    Returns:
        What `vitask.json` says of it: `r2` is that on held-out images.

    Raises:
        VITaskError: an old TSM that is not the connector's, patches of another number, too few images, images that
            cannot be read. Nothing is left behind, and what was in `output` stays.
    """
    check_replaceable(output, (checkpoint.RECORD_FILE, model_folder.CONNECTOR_FILE))
    check_folder(path, "checkpoint")
    check_folder(image_folder, "image folder")
    record = _record(path, connector)
    layers = connector_file.load_connector(connector or path)
    tokens = "all" if record["ep"] in ("all", "replace") else "cls"
    target = as_device(device)
    sides = (
        _side(new, new_features, tokens, target, trust_code),
        _side(old, old_features, tokens, target, trust_code),
    )
    _check_sides(*sides, record)
    samples = _samples(data)
    images = list(dict.fromkeys(sample["image"] for sample in samples))
    if not any_image_size:
        tsms = [side.source.trained_on for side in sides if isinstance(side.source, TSM)]
        used = _seen(samples, image_folder, data, record["tasks"])
        check_all([checkpoint.trained_on(record, path), *tsms], used)
    with memory_error_as(f"out of memory on {target} with {batch_size} images in a batch; give a smaller --batch-size"):
        dataset = _Images(sides, image_folder, images)
        found, count = _align(
            sides, DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=_collate)
        )
    step = {
        "from": sides[1].hash,
        "r2": round(found.r2, 4),
        "strength": found.strength,
        "images": count,
        "tokens": count * sides[0].length,
        "width": sides[0].width,
    }
    before = record.get("fitted", {})
    fitted = {
        "checkpoint": str(path),
        "identity": checkpoint.identity(path),
        "tsm": before.get("tsm", record["tsm"]["hash"]),
        "aligned": [*before.get("aligned", []), step],
    }
    places = {"vitask_tsm": new and str(new), "vitask_features": new_features and str(new_features)}
    flags = VITaskArguments(**{**record["arguments"], **places})
    tasks = {task: {"choices": choices} for task, choices in record["tasks"].items()}
    aligned = fold(layers, found.alignment)
    identity = {"hash": sides[0].hash, "width": sides[0].width}
    with atomic_directory(output) as directory:
        connector_file.save_connector(aligned, aligned.state_dict(), directory)
        checkpoint.save_record(directory, flags, aligned, identity, tasks, record["version"], fitted)
    return step


def _record(path: str | Path, connector: str | Path | None) -> dict[str, Any]:
    record = checkpoint.read_record(path) if connector is None else checkpoint.read_fitted(connector, path)
    if record is None or record["connector"] is None or record["tsm"] is None:
        ep = "no vitask.json" if record is None else f"--vitask_ep {record['ep']}"
        takes = "takes any TSM as it is" if record and record["ep"] == "text" else "has no part for any TSM"
        raise VITaskError(
            f"checkpoint {str(path)!r} has {ep}, so it {takes}; only a connector that was trained on a TSM's features "
            "(--vitask_ep cls, all or replace) can be aligned"
        )
    return record


def _side(
    folder: str | Path | None, features: str | Path | None, tokens: str, device: torch.device, trust_code: bool
) -> Side:
    if features is not None:
        return Side(FeatureStore.open(features), features, tokens)
    return Side(TSM.load(folder, device, trust_code=trust_code), folder, tokens)


def _check_sides(new: Side, old: Side, record: dict[str, Any]) -> None:
    trained = record["tsm"]["hash"]
    if old.hash != trained:
        raise VITaskError(
            f"the connector in use was made for TSM {trained[:12]}, and the old TSM given is {old.hash[:12]}; give the "
            "one it was made for (--from-tsm), or the features of that one (--features-from)"
        )
    if new.hash == old.hash:
        raise VITaskError(f"the new TSM is the old one ({old.hash[:12]}); there is nothing to align")
    if new.length != old.length:
        raise VITaskError(
            f"the new TSM gives {new.length} patches per image, the old one {old.length}, so they cannot be told from "
            f"each other one by one, as --vitask_ep {record['ep']} needs; use a TSM with {old.length} patches, or "
            "`vitask connector fit`"
        )


def _samples(data: str | Path) -> list[dict[str, Any]]:
    """The samples with a `vitask` block; without any such, all with an image.

    An exemplar is made for the first kind alone, and what two TSMs say of other pictures is not what matters.
    """
    samples = read_json(data, "data file")
    is_list = isinstance(samples, list) and all(isinstance(sample, dict) for sample in samples)
    rows = list(enumerate(samples)) if is_list else []
    own = [row for row in rows if "vitask" in row[1]] or [row for row in rows if "image" in row[1]]
    if not any("image" in sample for _, sample in own):
        raise VITaskError(f"data file {str(data)!r} is no list of samples with an 'image', so there is nothing to see")
    for index, sample in own:
        image = sample.get("image")
        if not isinstance(image, str) or not image:
            raise VITaskError(
                f"data file {str(data)!r}, sample {index} (id {sample.get('id')!r}): 'image' is {image!r}; expected "
                "one path relative to the image folder, so give each image a sample or take this one out"
            )
    return [sample for _, sample in own]


def _seen(samples: list[dict[str, Any]], folder: str | Path, data: str | Path, tasks: dict[str, list[str]]) -> Seen:
    """The images by task. Bare images are of the checkpoint's task, if it has but one.

    Args:
        tasks: {task: its labels} of the checkpoint.
    """
    only = next(iter(tasks)) if len(tasks) == 1 else ""
    bare = {"task": only, "choices": tasks.get(only, [])}
    blocks = [_block(sample) or bare for sample in samples]
    files = [(block["task"], inside(folder, sample["image"])) for block, sample in zip(blocks, samples, strict=True)]
    choices = {block["task"]: block["choices"] for block in blocks}
    return Seen(repr(str(data)), prepared({data: measured(files)}), choices)


def _block(sample: dict[str, Any]) -> dict[str, Any] | None:
    block = sample.get("vitask")  # nobody has checked it
    named = isinstance(block, dict) and isinstance(block.get("task"), str)
    return block if named and isinstance(block.get("choices"), list) else None


def _align(sides: tuple[Side, Side], loader: DataLoader) -> tuple[Found, int]:
    """The alignment of the second side by the first, and on how many images (files of one content count once)."""
    folds = [_Fold() for _ in range(FOLDS)]
    seen: set[str] = set()
    for hashes, features in _batches(sides, loader):
        for row, sha256 in enumerate(hashes):
            if sha256 not in seen:
                folds[len(seen) % FOLDS].add(*(side[row] for side in features))
                seen.add(sha256)
    if len(seen) < MINIMUM:
        raise VITaskError(
            f"there are {len(seen)} different images, and an alignment needs {MINIMUM} at least; add some"
        )
    return align([one.sums() for one in folds]), len(seen)


def _batches(sides: tuple[Side, Side], loader: DataLoader) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Hashes, and the features [B, E, F] of each side."""
    for batch in tqdm(loader, desc="Features of both TSMs", unit="batch", disable=None):
        if isinstance(batch, str):
            raise VITaskError(batch)
        hashes, read = batch
        yield hashes, [side.features(one) for side, one in zip(sides, read, strict=True)]


class _Fold:
    """Features of a fold's images, summed up whenever there are many."""

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._tokens = 0

    def add(self, new: Tensor, old: Tensor) -> None:
        """[E, F] and [E, G] of one image."""
        self._waiting.append((new, old))
        self._tokens += len(new)
        if self._tokens >= BUFFER:
            self._sum()

    def sums(self) -> Moments:
        self._sum()
        return self._moments

    def _sum(self) -> None:
        if self._waiting:
            moments = Moments.of(*(torch.cat(side) for side in zip(*self._waiting, strict=True)))
            self._moments = moments if self._moments is None else self._moments + moments
            self._waiting, self._tokens = [], 0


def expectation(step: dict[str, Any]) -> str:
    """What an R2 on held-out images promises, in words."""
    if step["r2"] >= GOOD:
        said = "expect about the accuracy with the old TSM, or the new TSM's own where that is lower"
    elif step["r2"] >= FAIR:
        said = "low: expect some of the accuracy with the old TSM to be lost; compare on validation data before use"
    else:
        said = (
            "very low: the new TSM says little of what the old one said, so expect answers worse than without an "
            "exemplar; check the new TSM's own accuracy, or use `vitask connector fit`"
        )
    if step["r2"] < GOOD and step["tokens"] < step["width"]:
        said += f"; these are few images for features {step['width']} wide, and more of them raise R2"
    return said


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--checkpoint", required=True, metavar="DIR", help="the tuned VLM: a VITask checkpoint; only its record is read"
    )
    add(
        "--connector", metavar="DIR", help="start from an aligned or fitted connector, in place of the checkpoint's own"
    )
    old = parser.add_mutually_exclusive_group(required=True)
    old.add_argument("--from-tsm", metavar="DIR", help="the old TSM: the one that the connector was made for")
    old.add_argument("--features-from", metavar="DIR", help="or its features of these images")
    new = parser.add_mutually_exclusive_group(required=True)
    new.add_argument("--tsm", metavar="DIR", help="the new TSM")
    new.add_argument("--features", metavar="DIR", help="or its features of these images")
    add("--data", required=True, metavar="JSON", help="training data whose images both TSMs look at; no labels needed")
    add("--image-folder", required=True, metavar="DIR", help="folder the image paths are relative to")
    add("--out", required=True, metavar="DIR", help="folder to write: for connector=DIR in lmms-eval's --model_args")
    add_flags(parser, "of training")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    step = align_connector(
        args.checkpoint,
        args.data,
        args.image_folder,
        args.out,
        old=args.from_tsm,
        new=args.tsm,
        old_features=args.features_from,
        new_features=args.features,
        connector=args.connector,
        batch_size=args.batch_size,
        workers=args.workers,
        device=args.device,
        trust_code=args.trust_tsm_code,
        any_image_size=args.any_image_size,
    )
    tqdm.write(
        f"connector aligned on {step['images']} images: R2 {step['r2']:.3f} on held-out images, ridge strength "
        f"{step['strength']:g}; {expectation(step)}"
    )
    tqdm.write(f"evaluate with pretrained={args.checkpoint},connector={args.out},tsm={args.tsm or 'NEW'}")
