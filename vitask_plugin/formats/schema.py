"""A declared format: types of pydantic that take a value as it is, or name the place where it is not.

A format checks; it converts nothing. What is read stays plain values, with keys of later versions among them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.formats.shown import pointer, short

Place = tuple[str | int, ...]
STRICT = ConfigDict(strict=True, allow_inf_nan=False)
RECORD_BYTES = 1 << 28  # of the largest record, the index of a million images


class Schema(BaseModel):
    """A part of a format: types are exact, numbers finite, keys that nobody reads are let pass."""

    model_config = ConfigDict(**STRICT, frozen=True)


def _visible(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("a text of one line that can be seen")
    return text


MAY_LACK: Any = None  # default of what may be absent, and is not null


def one_of(*values: Any) -> AfterValidator:
    """Takes one of these and nothing else; a `Literal` has to be spelled out."""

    def check(value: Any) -> Any:
        if value not in values:
            raise ValueError(" or ".join(map(repr, values)))
        return value

    return AfterValidator(check)


Name = Annotated[str, AfterValidator(_visible)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(gt=0)]


class Format:
    """A whole value that is declared.

    Args:
        kind: a `Schema`, or a TypedDict where millions are checked.
        remedy: what to do about a value that does not fit, the end of its sentence.
    """

    def __init__(self, kind: Any, remedy: str) -> None:
        self.kind, self.remedy = kind, remedy

    @cached_property
    def _validate(self) -> Any:
        return TypeAdapter(self.kind).validator.validate_python

    def read(self, path: str | Path, what: str) -> dict[str, Any]:
        """The values of a JSON file of this format, as they stand in it.

        Args:
            what: names the file in an error.

        Raises:
            VITaskError: it cannot be read (see `json_text`), or is not of this format: the place, what is there, what
                was expected, and what to do.
        """
        values = read_json(path, what, finite=True, largest=RECORD_BYTES)
        self.check(values, f"{what} {str(path)!r}")
        return values

    def check(self, values: Any, where: str | Callable[[], str]) -> None:
        """Refuses values that are not of this format.

        Args:
            where: opens the sentence, or gives what does.

        Raises:
            VITaskError: see `read`.
        """
        try:
            self._validate(values)
        except ValidationError as error:
            where = where if isinstance(where, str) else where()
            raise VITaskError(f"{where}: {problem(error, values, self.remedy)}") from None


def problem(error: ValidationError, values: Any, remedy: str) -> str:
    """The first thing that a model found in `values`: its place, what is there, what was expected, and what to do."""
    found = [(_place(one["loc"], values), one) for one in error.errors(include_url=False, include_input=False)]
    place, first = found[0]
    said = first["ctx"]["error"] if first["type"] == "value_error" else None
    if isinstance(said, VITaskError):  # a rule between several places, with a remedy of its own
        return str(said)
    if first["type"] == "missing":
        return f"{pointer(place)} is missing; {remedy}"
    # Of a union every kind says what it takes.
    expected = " or ".join(dict.fromkeys(_expected(one) for where, one in found if where == place))
    return f"{pointer(place)} is {short(_at(values, place))}; expected {expected}; {remedy}"


def _place(steps: Iterable[str | int], values: Any) -> Place:
    """The steps that lead somewhere in the values: pydantic also counts the members of a union and the keys as such."""
    place: Place = ()
    steps = list(steps)
    for number, step in enumerate(steps):
        inside = _has(values, step)
        # What is missing is the last step, and is not there.
        if inside or (number == len(steps) - 1 and isinstance(values, Mapping) and isinstance(step, str)):
            place = (*place, step)
        if inside:
            values = values[step]
    return place


def _has(values: Any, step: str | int) -> bool:
    if isinstance(values, Mapping):
        return step in values
    return isinstance(values, list | tuple) and isinstance(step, int) and -1 < step < len(values)


def _at(values: Any, place: Place) -> Any:
    for step in place:
        values = values[step] if _has(values, step) else None
    return values


_SAID = {
    "model_type": "an object",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "string_unicode": "a text of whole characters",
    "string_pattern_mismatch": "a text like {pattern}",
    "bool_type": "true or false",
    "none_required": "null",
    "extra_forbidden": "no such key",
}


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] in _SAID:
        return _SAID[error["type"]].format_map(error.get("ctx", {}))
    said = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return re.sub(r"^(List|String|Dictionary) should have ", "", said).replace(" after validation", "")
