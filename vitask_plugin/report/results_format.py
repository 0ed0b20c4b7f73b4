"""lmms-eval's files as far as they are read: figures of tasks, and what our tasks log of a sample below `n`."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from vitask_plugin.data.class_names import KINDS, MULTI_LABEL
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.schema import MAY_LACK, Count, Format, Name, Schema

_AGAIN = "evaluate it again"
_ROUNDING = 1e-3
Share = Annotated[float, Field(ge=0, le=1)]
Labels = Count | list[Count]


class Sizes(Schema):
    """How many images were judged, of how many there are."""

    effective: Count
    original: Count


class Results(Schema):
    """A file of figures; lmms-eval writes NaN for those that are not defined."""

    model_config = ConfigDict(allow_inf_nan=True)

    results: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    sizes: dict[str, Sizes] = Field(default=None, alias="n-samples")
    subtasks: dict[str, list[str]] = Field(default=None, alias="group_subtasks")
    configs: dict[str, dict[str, Any] | None] = MAY_LACK


class Logged(Schema):
    """What is known of one image; `_score` tasks log likelihoods, the others the strict reading."""

    file: str
    kind: Literal[KINDS]
    choices: Annotated[list[str], Field(min_length=2)]
    label: Labels
    prediction: Labels | None
    strict: Labels | None = None
    split: Name = "test"
    log_likelihoods: list[float] = MAY_LACK
    probabilities: list[Share] = MAY_LACK

    @model_validator(mode="after")
    def _of_the_choices(self) -> "Logged":
        several, count = self.kind == MULTI_LABEL, len(self.choices)
        for name in ("label", "prediction", "strict"):
            found = getattr(self, name)
            if found is None:
                continue
            indices = found if isinstance(found, list) else [found]
            if isinstance(found, list) != several or max(indices, default=0) >= count:
                many = "a list of indices" if several else "an index"
                raise VITaskError(f"/n/{name} is {found}; expected {many} of the {count} choices; {_AGAIN}")
        if self.probabilities is not None:
            self._check_scores(several, count)
        return self

    def _check_scores(self, several: bool, count: int) -> None:
        total, scores = sum(self.probabilities), self.log_likelihoods or []
        if len(self.probabilities) != count or (not several and abs(total - 1) > _ROUNDING):
            wanted = f"{count} numbers" if several else f"{count} numbers whose sum is 1"
            raise VITaskError(
                f"/n/probabilities are {len(self.probabilities)} numbers whose sum is {total:.4g}; expected {wanted}; "
                f"{_AGAIN}"
            )
        if len(scores) != count + several:
            raise VITaskError(
                f"/n/log_likelihoods are {len(scores)} numbers; expected {count + several}, one of each possible "
                f"answer; {_AGAIN}"
            )


class Sample(Schema):
    """A line of samples."""

    index: Count = Field(alias="doc_id")
    n: Logged


RESULTS = Format(Results, f"this is not a results file of lmms-eval, so remove it, or {_AGAIN}")
SAMPLE = Format(Sample, _AGAIN)
