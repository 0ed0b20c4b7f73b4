"""Features of training images from networks that have not seen them, in the feature space of the whole TSM.

A TSM that was trained with `--folds` has beside it one network for each fold, trained without it, the alignment of its
features with those of the whole TSM, and the fold of each training image, by the content of its file.

Shapes: B = batch, S = image side, E = tokens per image, F = width of a token, K_all = columns of the head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path, sha256_file
from vitask_plugin.method.alignment import Alignment
from vitask_plugin.tsm.model import FOLDS, TSM

ASSIGNMENT_FILE = "assignment.safetensors"
ALIGNMENT_FILE = "alignment.safetensors"


@dataclass(frozen=True)
class OutOfFold:
    """Whom to ask about an image.

    Attributes:
        whole: trained on all images; asked about those that are no training images.
        parts: trained without one fold each.
        alignments: {kind of token: to the whole TSM's} of each part.
        fold_of: {SHA-256 of a training image's file: its fold}.
    """

    whole: TSM
    parts: Sequence[TSM]
    alignments: Sequence[Mapping[str, Alignment]]
    fold_of: Mapping[bytes, int]

    def __call__(self, pixels: Tensor, hashes: Sequence[str], tokens: str) -> tuple[Tensor, Tensor]:
        """Tokens [B, E, F] and logits [B, K_all], float32, of pixels [B, 3, S, S].

        Args:
            hashes: [B], hex SHA-256 of the images' files. tokens: `cls` or `all`.
        """
        folds = torch.tensor([self.fold_of.get(bytes.fromhex(one), -1) for one in hashes], device=pixels.device)
        features, logits = None, None
        for fold in folds.unique().tolist():
            rows = (folds == fold).nonzero().squeeze(1)
            tsm = self.whole if fold < 0 else self.parts[fold]
            output = tsm(pixels[rows])
            found = tsm.tokens(output, tokens)
            if fold >= 0:
                found = self.alignments[fold][tokens](found.cpu()).to(found)
            if features is None:
                features = found.new_zeros(len(pixels), *found.shape[1:])
                logits = output.logits.new_zeros(len(pixels), output.logits.shape[1])
            features[rows], logits[rows] = found, output.logits
        return features, logits

    def save(self, directory: Path) -> dict[str, Any]:
        """Writes all but the whole TSM below a TSM's folder; what its record has to say of them."""
        folder = directory / FOLDS
        hashes = sorted(self.fold_of)
        content = {
            "sha256": torch.from_numpy(np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32).copy()),
            "fold": torch.tensor([self.fold_of[one] for one in hashes], dtype=torch.int16),
        }
        files = {ASSIGNMENT_FILE: content}
        for number, (part, alignments) in enumerate(zip(self.parts, self.alignments, strict=True)):
            (folder / str(number)).mkdir(parents=True)
            part.save(folder / str(number))
            files[f"{number}/{ALIGNMENT_FILE}"] = {
                f"{kind}.{name}": value.contiguous()
                for kind, alignment in alignments.items()
                for name, value in alignment._asdict().items()
            }
        for name, tensors in files.items():
            with atomic_path(folder / name) as path:
                save_file(tensors, path)
        return {
            "count": len(self.parts),
            "tsms": [part.hash for part in self.parts],
            "sha256": {name: sha256_file(folder / name) for name in files},
        }

    @classmethod
    def load(cls, directory: str | Path, whole: TSM) -> "OutOfFold | None":
        """What `save` wrote beside `whole`, on its device; None for a TSM without folds.

        Raises:
            VITaskError: something is missing or was changed.
        """
        record = whole.record.get("folds")
        if record is None:
            return None
        folder = Path(directory) / FOLDS
        for name, sha256 in record["sha256"].items():
            if not (folder / name).is_file() or sha256_file(folder / name) != sha256:
                raise VITaskError(
                    f"TSM {str(directory)!r} was trained with --folds, and {str(folder / name)!r} is missing or "
                    "changed; copy the whole TSM folder, or train it again"
                )
        parts = [TSM.load(folder / str(number), whole.device) for number in range(record["count"])]
        for number, (part, sha256) in enumerate(zip(parts, record["tsms"], strict=True)):
            if part.hash != sha256:
                raise VITaskError(
                    f"TSM {str(directory)!r}: {str(folder / str(number))!r} is not the network of its fold "
                    f"({part.hash[:12]}, recorded {sha256[:12]}); copy the whole TSM folder, or train it again"
                )
        assignment = load_file(folder / ASSIGNMENT_FILE)
        hashes = (row.tobytes() for row in assignment["sha256"].numpy())
        fold_of = dict(zip(hashes, assignment["fold"].tolist(), strict=True))
        alignments = [_alignments(folder / str(number) / ALIGNMENT_FILE) for number in range(record["count"])]
        return cls(whole, parts, alignments, fold_of)


def _alignments(path: Path) -> dict[str, Alignment]:
    tensors = load_file(path)
    kinds = dict.fromkeys(name.split(".")[0] for name in tensors)
    return {kind: Alignment(*(tensors[f"{kind}.{name}"] for name in Alignment._fields)) for kind in kinds}
