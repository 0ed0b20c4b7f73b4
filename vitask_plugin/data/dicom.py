"""DICOM files as pictures of PIL's, by pydicom (the extra `[dicom]`).

Grey values are those of the modality: rescale slope and intercept, or its lookup table, are applied, so that a window
of a data set means the same in all files. What a file itself says about how it is to be seen (lookup table or window of
interest, VOI) counts where the data set has no window.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from vitask_plugin.data.deep import DeepPixels
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError

_MARK, _AT = b"DICM", 128
_GREY = ("MONOCHROME1", "MONOCHROME2")
_VALUES = ("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
_SEEN = ("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence")
_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")  # where files of several frames keep them


def is_dicom(source: bytes | Path) -> bool:
    """Whether it is a DICOM file, by what stands behind its preamble."""
    if isinstance(source, bytes):
        return source[_AT : _AT + 4] == _MARK
    try:
        with open(source, "rb") as file:
            file.seek(_AT)
            return file.read(4) == _MARK
    except OSError:
        return False  # whoever reads it says so


def picture(source: bytes | Path, name: str | Path) -> "DicomPicture":
    """The first frame, of which the header alone is read yet.

    Raises:
        VITaskError: pydicom is not installed.
    """
    _pydicom(name)
    return DicomPicture(io.BytesIO(source) if isinstance(source, bytes) else source)


def _pydicom(name: str | Path) -> Any:
    try:
        import pydicom
    except ModuleNotFoundError:
        raise VITaskError(
            f"image {str(name)!r} is a DICOM file, which pydicom reads; install it with "
            "`pip install 'vitask-plugin[dicom]'`"
        ) from None
    return pydicom


class DicomPicture(ImageFile.ImageFile):
    """Mode L or RGB as it is to be seen, or F with deep pixels; `seek` chooses the frame.

    Attributes:
        windowed: whether the file says how its deep pixels are to be seen.
    """

    format, format_description = "DICOM", "DICOM"

    def _open(self) -> None:
        import pydicom

        self._header = pydicom.dcmread(self.fp, stop_before_pixels=True)
        if "Rows" not in self._header or "Columns" not in self._header:
            raise SyntaxError("the header is of no picture")
        self.n_frames = int(self._header.get("NumberOfFrames") or 1)
        self.is_animated = self.n_frames > 1
        self._size = int(self._header.Columns), int(self._header.Rows)
        self.seek(0)

    def seek(self, frame: int) -> None:
        self._frame = frame
        self._of_frame = _of_frame(self._header, frame)
        self.windowed = _is_windowed(self._of_frame)
        deep = self._header.get("SamplesPerPixel", 1) == 1 and _is_deep(self._of_frame)
        grey = self._header.get("PhotometricInterpretation") in _GREY
        self._mode = ("F" if deep else "L") if grey else "RGB"

    def tell(self) -> int:
        return self._frame

    def deep_pixels(self) -> DeepPixels:
        """The grey values of the modality, and how the file itself says they are to be seen."""
        import pydicom

        self.fp.seek(0)
        whole = pydicom.dcmread(self.fp)
        stored = pydicom.pixels.pixel_array(whole, index=self._frame)
        values = np.asarray(pydicom.pixels.apply_modality_lut(stored, self._of_frame))
        return DeepPixels(
            f"DICOM, {self._header.get('BitsStored', stored.dtype.itemsize * 8)} bits",
            values,
            _inside(stored, self._header),
            negative=self._header.PhotometricInterpretation == "MONOCHROME1",
            own=_own(self._of_frame) if self.windowed else None,
        )

    def load(self) -> Any:
        """As it is to be seen; of deep pixels their values."""
        if self._im is None:
            self.im = self._seen().im
        return Image.Image.load(self)

    def _seen(self) -> Image.Image:
        if self.mode == "RGB":
            return Image.fromarray(self._colours())
        pixels = self.deep_pixels()
        if self.mode == "F":
            return Image.fromarray(pixels.values.astype(np.float32))
        if pixels.own is not None:
            return pixels.to_8_bits(None)
        return pixels.to_8_bits(Window(0, 2**self._header.BitsStored - 1))

    def _colours(self) -> np.ndarray:
        """uint8 [H, W, 3]"""
        import pydicom

        self.fp.seek(0)
        whole = pydicom.dcmread(self.fp)
        values = pydicom.pixels.pixel_array(whole, index=self._frame)  # which makes RGB of YBR
        if whole.PhotometricInterpretation == "PALETTE COLOR":
            values = pydicom.pixels.apply_color_lut(values, whole)[..., :3]
            return (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values
        bits = whole.BitsStored
        return values if bits == 8 else Window(0, 2**bits - 1).apply(values)


def _of_frame(header: Any, frame: int) -> Any:
    """A data set with what the file says about the grey values of a frame: for all, or in groups for each."""
    import pydicom

    found = pydicom.Dataset()
    for name in ("PixelRepresentation", "BitsStored", "BitsAllocated", "PhotometricInterpretation", *_VALUES, *_SEEN):
        if name in header:
            found[name] = header[name]
    frames, shared = (
        header.get(name) or [] for name in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence")
    )
    for group in (*shared[:1], *frames[frame : frame + 1]):
        for sequence in _GROUPS:
            for item in group.get(sequence) or []:
                for element in item:
                    if element.keyword in (*_VALUES, *_SEEN):
                        found[element.keyword] = element
    rescale = {"RescaleSlope": 1, "RescaleIntercept": 0}
    if any(found.get(name) is not None for name in rescale):  # pydicom takes both or none
        for name, default in rescale.items():
            setattr(found, name, default if found.get(name) is None else found.get(name))
    return found


def _is_deep(found: Any) -> bool:
    """Whether grey values go beyond 0 to 255."""
    changed = "ModalityLUTSequence" in found or (
        float(found.get("RescaleSlope") or 1),
        float(found.get("RescaleIntercept") or 0),
    ) != (1, 0)
    return changed or found.get("BitsStored", 32) > 8 or found.get("PixelRepresentation", 0) == 1


def _is_windowed(found: Any) -> bool:
    return bool(found.get("VOILUTSequence")) or (
        found.get("WindowCenter") is not None and found.get("WindowWidth") is not None
    )


def _inside(stored: np.ndarray, header: Any) -> np.ndarray | None:
    """[H, W] float, 0 where a pixel is outside of what was scanned."""
    if "PixelPaddingValue" not in header:
        return None
    ends = [int(header.PixelPaddingValue), int(header.get("PixelPaddingRangeLimit", header.PixelPaddingValue))]
    return ((stored < min(ends)) | (stored > max(ends))).astype(float)


def _own(found: Any) -> Callable[[np.ndarray], np.ndarray]:
    """From grey values [H, W] to uint8, by the first lookup table or window of a file."""
    if found.get("VOILUTSequence"):
        return lambda values: _by_table(values, found)
    center, width = (_first(found[name].value) for name in ("WindowCenter", "WindowWidth"))
    kind = found.get("VOILUTFunction") or "LINEAR"
    if kind == "SIGMOID":
        return lambda values: (
            (255 / (1 + np.exp(-4 * (values.astype(float) - center) / width))).round().astype(np.uint8)
        )
    if kind == "LINEAR":  # the standard's: to the last whole number within
        center, width = center - 0.5, width - 1
    half = max(width / 2, 1e-6)  # a width of one is a step
    return Window(center - half, center + half).apply


def _by_table(values: np.ndarray, found: Any) -> np.ndarray:
    import pydicom

    seen = pydicom.pixels.apply_voi(values.astype(np.int64), found, index=0)
    bits = int(found.VOILUTSequence[0].LUTDescriptor[2])
    return Window(0, 2**bits - 1).apply(seen)


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, (list, tuple)) or hasattr(value, "__getitem__") else value)
