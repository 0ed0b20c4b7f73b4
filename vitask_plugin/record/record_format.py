"""`vitask.json`: what stands in the record of a checkpoint, or of a connector that was fitted to one."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator

from vitask_plugin.arguments import CONNECTOR_KINDS, VITaskArguments
from vitask_plugin.data.labels_format import TaskImages
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.schema import MAY_LACK, Count, Format, Name, Positive, Schema, Sha256, one_of
from vitask_plugin.method.connector import LEARNED

FORMAT = 1


def _known(flags: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(flags.keys() - VITaskArguments.__dataclass_fields__.keys())
    if unknown:
        raise VITaskError(
            f"/arguments has the unknown flag --{unknown[0]}; upgrade vitask-plugin if a later one wrote it"
        )
    lacking = [name for name in ("vitask_stage", "vitask_ep") if name not in flags]
    if lacking:
        raise VITaskError(f"/arguments/{lacking[0]} is missing; copy the checkpoint again")
    return flags


class Connector(Schema):
    """Shape and content of `vitask_connector.safetensors`; early records have no hash."""

    kind: Annotated[str, one_of(*CONNECTOR_KINDS, LEARNED)]
    width: Count = Field(alias="in")  # 0 of a learned prefix
    out: Positive
    sha256: Sha256 = MAY_LACK


class Trained(Schema):
    """The TSM whose features were trained on, and their width."""

    hash: Name
    width: Positive


class Fitted(Schema):
    """Of `vitask connector align` and `fit`: which checkpoint the connector belongs to."""

    checkpoint: str
    identity: Sha256


class Question(Schema):
    """How a task was asked, without the image token."""

    text: str
    multi_label: bool


class Record(Schema):
    """Early ones lack what has a default."""

    format: Annotated[int, one_of(FORMAT)]
    version: str = ""
    arguments: Annotated[dict[str, str | int | float | bool | None], AfterValidator(_known)]
    ep: Name
    tsm: Trained | None
    connector: Connector | None
    tasks: dict[Name, list[str]] = MAY_LACK
    versions: dict[str, str] = MAY_LACK
    images: dict[str, TaskImages] | None = None
    questions: dict[Name, Question] = MAY_LACK
    base: dict[Name, Annotated[str, Field(pattern="^([0-9a-f]{4})+$")]] = MAY_LACK
    fitted: Fitted = MAY_LACK
    run: dict[str, Any] = MAY_LACK
    files: dict[str, int] = MAY_LACK

    @model_validator(mode="after")
    def _one_exemplar(self) -> "Record":
        if self.ep != self.arguments["vitask_ep"]:
            raise VITaskError(
                f"/ep is {self.ep!r} and /arguments/vitask_ep is {self.arguments['vitask_ep']!r}; copy it again"
            )
        return self


RECORD = Format(Record, "copy it again, or upgrade vitask-plugin if a later one wrote it")
