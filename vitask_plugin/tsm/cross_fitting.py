"""`--folds K`: a TSM is surer of the images it was trained on than of any other, and a VLM that is tuned on its
features of those learns to trust it more than it should. So K further networks are trained, each without one fold of
the training images, and speak for the images of that fold (`out_of_fold`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vitask_plugin.method.alignment import Alignment, Moments, align
from vitask_plugin.tsm.device import memory_error_as
from vitask_plugin.tsm.folds import Folds, files_of
from vitask_plugin.tsm.model import TSM, TSMOutput
from vitask_plugin.tsm.out_of_fold import OutOfFold
from vitask_plugin.tsm.samples import LabelledImage, read_picture

MOST_IMAGES = 4096  # that an alignment is fitted on
PARTS = 5  # of them, each held out once to choose the strength of the ridge


def brought_together(
    whole: TSM,
    parts: Sequence[TSM],
    folds: Folds,
    images: Sequence[LabelledImage],
    val_images: Sequence[LabelledImage],
    seed: int,
) -> tuple[OutOfFold, list[dict[str, float]]]:
    """The networks of the folds with their alignments to the whole TSM.

    An alignment is fitted where both networks stand alike to the images: on training images that both were trained on,
    and on validation images, which neither was.

    Returns:
        And of each fold, by kind of token, the residual: the share of the whole TSM's variance on held-out images that
        the aligned features miss.
    """
    alignments, residuals = [], []
    for fold, part in enumerate(parts):
        files = files_of([*folds.without(fold, images), *val_images])
        if len(files) > MOST_IMAGES:
            kept = np.random.default_rng(seed).choice(len(files), MOST_IMAGES, replace=False)
            files = [files[index] for index in np.sort(kept)]
        found, residual = _aligned(part, whole, files, f"fold {fold + 1} aligned")
        alignments.append(found)
        residuals.append(residual)
    numbers = map(bytes.fromhex, folds.hashes)
    return OutOfFold(whole, parts, alignments, dict(zip(numbers, folds.numbers, strict=True))), residuals


def _aligned(
    part: TSM, whole: TSM, files: Sequence[Any], title: str
) -> tuple[Mapping[str, Alignment], dict[str, float]]:
    kinds = ["cls", "all"] if whole.record["patch_count"] else ["cls"]
    moments: dict[str, list[Moments | None]] = {kind: [None] * PARTS for kind in kinds}
    for number, (new, old) in enumerate(_outputs(part, whole, files, title)):
        for kind in kinds:
            tokens = (tsm.tokens(output, kind).flatten(0, 1).cpu() for tsm, output in ((part, new), (whole, old)))
            own, held = Moments.of(*tokens), moments[kind][number % PARTS]
            moments[kind][number % PARTS] = own if held is None else held + own
    found = {kind: align([one for one in own if one is not None]) for kind, own in moments.items()}
    return {kind: one.alignment for kind, one in found.items()}, {kind: 1 - one.r2 for kind, one in found.items()}


def _outputs(part: TSM, whole: TSM, files: Sequence[Any], title: str) -> Iterator[tuple[TSMOutput, TSMOutput]]:
    """What both say of the images, some at a time: at least two times, and so that each part of the images is large."""
    size = max(1, min(16, len(files) // (2 * PARTS)))
    with memory_error_as("out of memory while the folds are aligned; train on another --device"):
        for start in tqdm(range(0, len(files), size), title, leave=False, unit="batch", disable=None):
            pictures = [whole.preprocess(read_picture(path)) for path in files[start : start + size]]
            pixels = torch.stack(pictures).to(whole.device)
            yield part(pixels), whole(pixels)
