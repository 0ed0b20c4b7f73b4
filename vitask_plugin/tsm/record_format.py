"""`tsm.json`: what stands in the record of a TSM."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vitask_plugin.data.labels_format import TaskImages
from vitask_plugin.formats.schema import MAY_LACK, Count, Format, Name, Schema

FORMAT = 1
_Channels = Field(min_length=3, max_length=3)


class Source(Schema):
    """Of what the network is built: a timm model, or a factory of a Python module."""

    timm: Name = MAY_LACK
    module: str = MAY_LACK
    options: Any = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "Source":
        if (self.timm is None) == (self.module is None):
            raise ValueError("either 'timm' or 'module' in it")
        return self


class Task(Schema):
    """One task's columns of the head; where no record says where they begin, they follow those before."""

    choices: Annotated[list[str], Field(min_length=2)]
    multi_label: bool
    first_column: Count = 0


class Temperature(Schema):
    """Of `temperature.fitted`."""

    value: Annotated[float, Field(gt=0)]


class Record(Schema):
    """What `TSM.save` writes."""

    format: Literal[FORMAT]
    source: Source
    image_size: Annotated[int, Field(ge=1, le=1 << 14)]
    mean: Annotated[list[float], _Channels]
    std: Annotated[list[Annotated[float, Field(gt=0)]], _Channels]
    tasks: Annotated[dict[Name, Task], Field(min_length=1)]
    images: dict[str, TaskImages] | None = None
    temperature: Temperature = MAY_LACK
    folds: dict[str, Any] = MAY_LACK
    feature_width: Count = 0
    patch_count: Count = 0
    patch_width: Count = 0
    sha256: str = ""


RECORD = Format(Record, "copy the TSM again, or write it again")
