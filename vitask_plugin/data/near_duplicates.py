"""Images of two splits that show nearly the same: the same picture compressed again, scaled, or a little brighter.

A perceptual hash of 64 bits finds candidates, a small grey copy of each image confirms them. Crops, turned and mirrored
images are not found.

Shapes: N = images.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

_SIDE = 32  # of the grey copy that is hashed, in pixels
_LOW = 8  # lowest frequencies of the copy, per direction: 64 bits
_COPY = 16  # side of the grey copy that confirms
# Chosen on 400 drawn pictures of 4 kinds, of 28 and 224 pixels: copies (JPEG quality 30-90, twice and half the size,
# 10% brighter, less contrast, blurred, noisy) are at most 8 bits and mostly .97 or more from their original, different
# pictures of one kind at least 12 bits and at most .94.
MOST_BITS = 7  # that hashes of nearly the same picture differ in
LEAST_LIKENESS = 0.97  # correlation of the two copies
_FLAT = 2.0  # standard deviation, in grey levels of 255, below which there is nothing to compare
_BAND_BITS = 64 // (MOST_BITS + 1)  # of MOST_BITS + 1 bands, two near hashes have at least one in common
_TRIED = 8  # nearest candidates of an image that are confirmed

_PLACES = np.arange(_SIDE)
_COSINES = np.cos(np.pi / _SIDE * (_PLACES[None] + 0.5) * np.arange(_LOW)[:, None])  # [_LOW, _SIDE], of the DCT
_ONES = np.array([number.bit_count() for number in range(256)], np.uint8)
_WEIGHTS = (np.uint64(1) << np.arange(64, dtype=np.uint64)).reshape(_LOW, _LOW)


class NearDuplicates:
    """Takes images one by one and, at the end, pairs those of later splits with the nearest of earlier ones.

    Attributes:
        flat: number of images of nearly one colour, which are left out.
    """

    def __init__(self) -> None:
        self.flat = 0
        self._hashes: list[int] = []
        self._copies: list[np.ndarray] = []
        self._indices: list[int] = []
        self._splits: list[str] = []

    def see(self, index: int, split: str, image: Image.Image) -> None:
        """Takes a picture; `index` is the caller's name for it."""
        grey = image.convert("L")
        small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), np.float64)
        if small.std() < _FLAT:
            self.flat += 1
            return
        self._hashes.append(perceptual_hash(small))
        self._copies.append(np.asarray(grey.resize((_COPY, _COPY), Image.Resampling.BILINEAR)).ravel())
        self._indices.append(index)
        self._splits.append(split)

    def pairs(self, splits: Sequence[str]) -> list[tuple[int, int]]:
        """(earlier, later) image of each image that has a near duplicate in an earlier one of `splits`: the nearest."""
        hashes, copies = np.array(self._hashes, np.uint64), np.array(self._copies, np.uint8)
        numbers = np.array([splits.index(split) for split in self._splits])
        found = []
        for later in range(1, len(splits)):
            old, new = np.flatnonzero(numbers < later), np.flatnonzero(numbers == later)
            if len(old) and len(new):
                nearest = _nearest(hashes[old], copies[old], hashes[new], copies[new])
                found += [(self._indices[old[a]], self._indices[new[b]]) for b, a in sorted(nearest.items())]
        return found


def perceptual_hash(grey: np.ndarray) -> int:
    """64 bits of a grey picture [32, 32]: which of its lowest frequencies are above their median."""
    frequencies = _COSINES @ grey @ _COSINES.T
    frequencies[0, 0] = 0  # the brightness
    return int((_WEIGHTS * (frequencies > np.median(frequencies)).astype(np.uint64)).sum())


def _nearest(old: np.ndarray, old_copies: np.ndarray, new: np.ndarray, new_copies: np.ndarray) -> dict[int, int]:
    """`{row of new: row of old}` of the likest copy among the nearest hashes, where it is like enough.

    Only rows that have a band of their hashes in common are compared.
    """
    candidates: dict[int, list[tuple[int, int]]] = {}
    for band in range(MOST_BITS + 1):
        shift, mask = np.uint64(band * _BAND_BITS), np.uint64((1 << _BAND_BITS) - 1)
        old_keys, new_keys = (old >> shift) & mask, (new >> shift) & mask
        order = np.argsort(old_keys, kind="stable")
        starts = np.searchsorted(old_keys[order], new_keys, "left")
        ends = np.searchsorted(old_keys[order], new_keys, "right")
        for row in np.flatnonzero(ends > starts):
            members = order[starts[row] : ends[row]]
            bits = _ONES[(old[members] ^ new[row]).view(np.uint8).reshape(-1, 8)].sum(1)
            near = np.flatnonzero(bits <= MOST_BITS)
            if len(near) > _TRIED:
                near = near[np.argsort(bits[near], kind="stable")[:_TRIED]]
            candidates.setdefault(int(row), []).extend((int(bits[i]), int(members[i])) for i in near)
    found = {}
    for row, pairs in candidates.items():
        tried = [member for _, member in sorted(set(pairs))[:_TRIED]]
        if not tried:
            continue
        alike = _likeness(new_copies[row], old_copies[tried])
        best = int(np.argmax(alike))
        if alike[best] >= LEAST_LIKENESS:
            found[row] = tried[best]
    return found


def _likeness(copy: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Correlation of a copy [P] with others [N, P]."""
    left, right = copy - copy.mean(), others - others.mean(1, keepdims=True)
    scale = np.sqrt((left**2).sum() * (right**2).sum(1))
    return (right @ left) / np.maximum(scale, 1e-9)
