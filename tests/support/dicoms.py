"""Small DICOM files, made with pydicom."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid


def write(path: Path, values: np.ndarray, **elements: Any) -> Path:
    """Values [H, W], [frames, H, W] (grey) or [H, W, 3] (8-bit colour), and elements by keyword, which also replace
    those that follow from the values.
    """
    colour = values.ndim == 3 and values.shape[-1] == 3 and values.dtype == np.uint8
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns = values.shape[:2] if colour else values.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    if values.ndim == 3 and not colour:
        dataset.NumberOfFrames = len(values)
    bits = values.dtype.itemsize * 8
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelData = values.tobytes() + b"\0" * (values.nbytes % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def item(**elements: Any) -> pydicom.Dataset:
    """Of a sequence."""
    found = pydicom.Dataset()
    for keyword, value in elements.items():
        setattr(found, keyword, value)
    return found


def table(first: int, values: np.ndarray, bits: int) -> list[pydicom.Dataset]:
    """A lookup table."""
    one = pydicom.Dataset()
    one.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(values), first, bits])
    one.add_new("LUTData", "US", values.tolist())
    return [one]
