"""`labels.json` of a data set, and what it and the records of a training say of a task's images."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from vitask_plugin.data.class_names import KINDS, check_choices, check_modality
from vitask_plugin.formats.schema import MAY_LACK, Count, Format, Name, Positive, Schema


def _choices(names: list[str]) -> list[str]:
    check_choices(names, "/choices")
    return names


def _modality(text: str) -> str:
    check_modality(text)
    return text


def _rising(ends: list[float]) -> list[float]:
    if ends[0] >= ends[1]:
        raise ValueError("two numbers, the lower one first")
    return ends


def _in_order(ends: list[int]) -> list[int]:
    if ends[0] > ends[1]:
        raise ValueError("the least and the most")
    return ends


Choices = Annotated[list[str], AfterValidator(_choices)]
_PAIR = Field(min_length=2, max_length=2)
Range = Annotated[list[Positive], _PAIR, AfterValidator(_in_order)]


class Pixels(Schema):
    """What was done to the pixels, each where it was; see `difference.Images`."""

    window: Annotated[list[float], _PAIR, AfterValidator(_rising)] = MAY_LACK
    of_8_bits: bool = False
    frame: Count = 0
    max_side: Positive = MAY_LACK
    resampling: Name = MAY_LACK


class TaskImages(Schema):
    """Sizes of a task's images, [least, most] in pixels, and how many were looked at."""

    width: Range
    height: Range
    images: Count = 0
    pixels: Pixels = MAY_LACK


class Labels(Schema):
    """The label set of one data set."""

    task: Name
    choices: Choices
    modality: Annotated[str, AfterValidator(_modality)]
    type: Literal[KINDS]
    pixels: Pixels = MAY_LACK
    file: Name = MAY_LACK  # of a published set
    duplicates: list[list[dict[str, str]]] = MAY_LACK
    near_duplicates: list[list[dict[str, str]]] = MAY_LACK
    dropped: list[dict[str, str]] = MAY_LACK

    @model_validator(mode="after")
    def _binary_has_two(self) -> "Labels":
        if self.type == "binary-class" and len(self.choices) != 2:
            raise ValueError("two choices for the type 'binary-class'")
        return self


class Sets(Schema):
    """Those of several data sets, which `vitask data merge` put together, by the name of each."""

    sets: dict[Name, Labels]


class _Prepared(Schema):
    """What is read of a label set for its pixels alone; a later version may know more of the rest."""

    task: str
    pixels: Pixels = MAY_LACK


_REMEDY = "write the data set again with `vitask data folder`"
LABELS = Format(Labels, f"this is no label set, so {_REMEDY}")
SETS = Format(Sets, "write the sets again with `vitask data merge`")
PREPARED = Format(_Prepared, _REMEDY)
