"""Recipes in and out: YAML with strict keys, `--set section.key=value`, and the commented file of `--print-recipe`."""

import difflib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.schema import problem
from vitask_plugin.formats.text import read_text
from vitask_plugin.run.recipe import DEFAULTS, DataSet, Recipe

RECIPE_BYTES = 1 << 20
_WIDTH = 116
_COLUMN = 34  # of the comments


class _Loader(yaml.SafeLoader):
    """YAML 1.1, but 2e-4 is a number, as people expect, and a key that is there twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                line = node.start_mark.line + 1
                raise VITaskError(f"key {key!r} is there twice in the section of line {line}; leave one of them out")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Its counterpart: a text that `_Loader` would take for a number is quoted."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def read_recipe(path: str) -> dict[str, Any]:
    """What a recipe file holds, as plain values.

    Raises:
        VITaskError: no such file, no YAML, or no mapping.
    """
    return _parsed(read_text(path, "recipe", "YAML file", "a recipe", RECIPE_BYTES), f"recipe {path!r}")


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise VITaskError(f"{where} is no readable YAML ({' '.join(str(error).split())}); correct it") from None
    except VITaskError as error:
        raise VITaskError(f"{where}: {error}") from None
    except (RecursionError, ValueError) as error:  # nested without end; a number or a date that is none
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise VITaskError(f"{where} is no readable YAML ({why}); correct it") from None
    if not isinstance(found, dict):
        raise VITaskError(f"{where} holds no keys; `vitask run --print-recipe` prints a whole one")
    return found


def with_settings(values: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """`values` with those of `--set`, each "key=value" or "section.key=value"; the value is read as YAML.

    Raises:
        VITaskError: a word without `=`, or a section that is none.
    """
    result = dict(values)
    for word in settings:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise VITaskError(f"--set {word!r} sets nothing; give SECTION.KEY=VALUE, such as tsm.epochs=10")
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise VITaskError(f"--set {word!r}: the value is no readable YAML; quote it") from None
        *sections, key = path.split(".")
        place = result
        for section in sections:
            inner = place.get(section, {})
            if not isinstance(inner, Mapping):
                raise VITaskError(f"--set {word!r}: {section!r} holds no keys of its own; write it into a recipe file")
            place[section] = place = dict(inner)
        place[key] = value
    return result


def parsed(values: Mapping[str, Any]) -> Recipe:
    """The recipe of plain values.

    Raises:
        VITaskError: naming the first key that is unknown, with the nearest known one, or whose value cannot be.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            raise VITaskError(_unknown([str(part) for part in first["loc"]])) from None
        raise VITaskError(f"recipe: {problem(error, values, 'change it')}") from None


def _unknown(path: Sequence[str]) -> str:
    """The sentence for a key that nobody knows: the nearest of its section, or the same or a like one of another."""
    known = dict(_keys(Recipe, ()))
    section = tuple(part for part in path[:-1] if not part.isdecimal())
    own = [name[-1] for name in known if name[:-1] == section]
    near = difflib.get_close_matches(path[-1], own, 1, 0.6)
    if near:
        hint = ".".join([*path[:-1], *near])
    else:
        last = {name[-1]: name for name in known}
        match = difflib.get_close_matches(path[-1], list(last), 1, 0.75)
        hint = ".".join(last[match[0]]) if match else None
    advice = f"the nearest known one is {hint!r}" if hint else f"known there: {', '.join(own)}"
    return f"recipe: unknown key {'.'.join(path)!r}; {advice}"


def _keys(model: type[BaseModel], above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], type[BaseModel] | None]]:
    for name, field in model.model_fields.items():
        inner = _section(field.annotation)
        yield (*above, name), inner
        if inner is not None:
            yield from _keys(inner, (*above, name))


def _section(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


# Out -------------------------------------------------------------------------------------------------------------


def written(recipe: Recipe) -> str:
    """The recipe as YAML with every setting and a comment on each; it reads back as the same recipe."""
    recipe = recipe if recipe.data else recipe.model_copy(update={"data": [DataSet()]})
    head = "# A recipe of `vitask run`. null: the default that the comment tells.\n"
    return head + "\n".join(_lines(recipe, "")) + "\n"


def _lines(section: BaseModel, indent: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        comment = _comment(field.description or "")
        if isinstance(value, BaseModel):
            yield f"\n{indent}{name}:  # {comment}"
            yield from _lines(value, f"{indent}  ")
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            yield f"\n{indent}{name}:  # {comment}"
            for one in value:
                first, *rest = _lines(one, f"{indent}    ")
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        else:
            yield from _commented(f"{indent}{name}: {_plain(value)}", comment)


def _plain(value: Any) -> str:
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _commented(text: str, comment: str) -> Iterator[str]:
    if len(text) + len(comment) + 4 <= _WIDTH or len(text) >= _COLUMN:
        yield f"{text.ljust(_COLUMN)}  # {comment}"
        return
    first, *rest = textwrap.wrap(comment, _WIDTH - _COLUMN - 4)
    yield f"{text.ljust(_COLUMN)}  # {first}"
    for line in rest:
        yield f"{'':{_COLUMN}}  # {line}"


def _comment(text: str) -> str:
    """`text` with each "{section.key}" as the two defaults."""
    return re.sub(r"\{([a-z0-9_.]+)\}", lambda found: _both(*DEFAULTS[found[1]]), text)


def _both(plain: Any, tiny: Any) -> str:
    def word(value: Any) -> str:
        return "its own" if value is None else f"{value:g}" if isinstance(value, float) else str(value).lower()

    return word(plain) if plain == tiny else f"{word(plain)}; tiny: {word(tiny)}"
