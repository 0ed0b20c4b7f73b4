"""Which tests are slow: those that train, start processes or make a VLM, themselves or by a fixture that they ask for.

`make test-fast` leaves them out. No list of tests is kept: the code of a test, of its fixtures and of what they call in
tests/ is looked through for the use of what takes long.
"""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
# Modules, or functions and classes by module and name.
LONG = {
    "subprocess",
    "multiprocessing",
    "lmms_eval",
    "vitask_plugin.demo.demo",
    "vitask_plugin.run.engine.Engine",
    "vitask_plugin.tsm.train.train",
    "vitask_plugin.hf.train",
    "vitask_plugin.hf.tiny",
    "vitask_plugin.llava.train",
    "vitask_plugin.llava.tiny",
}
# What `vitask.cli.main` takes long with: words that stand in one function.
LONG_COMMANDS = ({"tsm", "train"}, {"connector", "fit"})


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


def words_of(constants: tuple[object, ...]) -> Iterator[str]:
    """Texts among a function's constants, also in tuples."""
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from words_of(constant)


def plain(function: Callable) -> Callable:
    """Without the wrappers of decorators and of fixtures."""
    return inspect.unwrap(getattr(function, "__func__", function))


def name_of(value: object) -> str:
    """`module` of a module, `module.name` of a function or a class; the first part of a module's name counts too."""
    if isinstance(value, types.ModuleType):
        return value.__name__
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


@functools.cache
def takes_long(function: Callable) -> bool:
    """Whether it, or what it calls in tests/, uses any of `LONG`."""
    todo, seen = [plain(function)], set()
    while todo:
        one = todo.pop()
        code = getattr(one, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        for part in codes(code):
            words = set(words_of(part.co_consts))
            if any(command <= words for command in LONG_COMMANDS):
                return True
            for name in part.co_names:
                value = one.__globals__.get(name, name)  # a name that is imported inside stays a name
                found = value if isinstance(value, str) else name_of(value)
                if any(f"{found}.".startswith(f"{long}.") for long in LONG):
                    return True
                source = getattr(getattr(value, "__code__", None), "co_filename", "")
                if source.startswith(str(TESTS)):
                    todo.append(plain(value))
    return False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        definitions = item._fixtureinfo.name2fixturedefs.values()
        functions = [item.function, *(definition.func for found in definitions for definition in found)]
        if any(takes_long(plain(function)) for function in functions):
            item.add_marker(pytest.mark.slow)
