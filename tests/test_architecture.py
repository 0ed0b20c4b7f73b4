"""The house rules that a machine can check: who imports whom, the frozen flags, the README's tree, safe loading."""

import ast
import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vitask_plugin.arguments import VITaskArguments

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"vitask_plugin": ROOT / "vitask_plugin", "vitask_plugin.eval_tasks": ROOT / "eval_tasks"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Data flows one way: a module imports its own room and the rooms before it, never a later one.
ROOMS = (
    ("errors", "formats", "files", "model_folder", "options", "arguments", "method"),
    ("data", "reading"),
    ("tsm", "record"),
    ("inference", "deepspeed"),
    ("training",),
    ("llava", "hf"),
    ("evaluation",),
    ("report",),
    (
        "eval_tasks",
        "estimate_memory",
        "merge",
        "stages",
        "connector_fit",
        "doctor",
        "judge_tsm",
        "cli",
    ),
    ("run",),
    ("demo", "demo_hosts"),
)
HOSTS = ("llava", "hf")  # which do not know each other
MAY_IMPORT_LLAVA = ("vitask_plugin.llava.*", "vitask_plugin.evaluation.lmms_*")
MAY_IMPORT_LMMS_EVAL = ("vitask_plugin.evaluation.lmms_*", "vitask_plugin.eval_tasks.*")

FLAGS = {
    "vitask": False,
    "vitask_stage": 1,
    "vitask_tsm": None,
    "vitask_trust_tsm_code": False,
    "vitask_features": None,
    "vitask_features_dtype": "float32",
    "vitask_ep": "cls",
    "vitask_connector": "mlp2x_gelu",
    "vitask_connector_lr": 1e-3,
    "vitask_rda_weight": 1.0,
    "vitask_rda_detach": True,
    "vitask_crt_weight": 0.1,
    "vitask_connector_path": None,
    "vitask_engine": "auto",
    "vitask_attention": "sdpa",
    "vitask_check_images": "sample",
    "vitask_eval_data": None,
    "vitask_eval_samples": 0,
    "vitask_early_stopping_patience": 0,
    "vitask_class_balance": 0.0,
    "vitask_set_temperature": 1.0,
}

# Distribution of a top-level module where the names differ.
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# Declared though no file imports them, with the reason.
NEEDED_BY_OTHERS = {
    "accelerate": "transformers.Trainer",
    "protobuf": "sentencepiece tokenizers",
    "requests": "llava.mm_utils and llava.train",
    "torchvision": "timm",
}


def modules() -> dict[str, ast.Module]:
    """`{dotted name: syntax tree}` of every module that is installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Dotted names that module `name` imports anywhere in it, inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} uses a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name: str) -> set[str]:
    """The project's modules that module `name` imports."""
    found = set()
    for target in imports(name):
        if target.partition(".")[0] == "vitask_plugin":
            # `from package.module import thing`: the module is the longest prefix that is one.
            while target not in MODULES:
                target = target.rpartition(".")[0]
            found.add(target)
    return found - {name, "vitask_plugin"}


def room(name: str) -> int:
    part = name.split(".")[1]
    numbers = [number for number, parts in enumerate(ROOMS) if part in parts]
    assert numbers, f"{name} is in no room; add it to ROOMS"
    return numbers[0]


def test_rooms_import_only_earlier_rooms() -> None:
    assert all(room(name) >= 0 for name in MODULES if name != "vitask_plugin")
    edges = [(name, target) for name in MODULES if name != "vitask_plugin" for target in own_imports(name)]
    assert len(edges) > 20
    assert [f"{name} imports {target}" for name, target in edges if room(target) > room(name)] == []


def test_no_import_cycles() -> None:
    graph = {name: own_imports(name) for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == set(MODULES)


METHOD_MODULES = fnmatch.filter(MODULES, "vitask_plugin.method*")


@pytest.mark.parametrize("name", METHOD_MODULES)
def test_method_knows_only_torch(name: str) -> None:
    packages = {target.partition(".")[0] for target in imports(name)} - set(sys.stdlib_module_names)
    assert packages - {"vitask_plugin"} <= {"torch"}
    assert {room(target) for target in own_imports(name)} <= {0}


@pytest.mark.parametrize(("host", "allowed"), [("llava", MAY_IMPORT_LLAVA), ("lmms_eval", MAY_IMPORT_LMMS_EVAL)])
def test_hosts_are_reached_from_few_places(host: str, allowed: tuple[str, ...]) -> None:
    importers = {name for name in MODULES if any(target.partition(".")[0] == host for target in imports(name))}
    assert importers
    assert {n for n in importers if not any(fnmatch.fnmatch(n, pattern) for pattern in allowed)} == set()


@pytest.mark.parametrize("room", ["method", "record", "inference", "training", "deepspeed", "data", "tsm"])
def test_no_room_below_the_hosts_knows_one(room: str) -> None:
    hosts = ("llava", "lmms_eval", *(f"vitask_plugin.{host}" for host in (*HOSTS, "evaluation")))
    importing = {name: list(imports(name)) for name in fnmatch.filter(MODULES, f"vitask_plugin.{room}*")}
    assert importing
    for name, targets in importing.items():
        assert [t for t in targets if any(f"{t}.".startswith(f"{host}.") for host in hosts)] == [], name


@pytest.mark.parametrize("host", HOSTS)
def test_hosts_do_not_know_each_other(host: str) -> None:
    others = [f"vitask_plugin.{other}." for other in HOSTS if other != host]
    known = [(name, t) for name in fnmatch.filter(MODULES, f"vitask_plugin.{host}*") for t in own_imports(name)]
    assert known
    assert [(name, t) for name, t in known if any(f"{t}.".startswith(other) for other in others)] == []


def test_imports_are_declared_and_declared_packages_are_needed() -> None:
    hosts = {"vitask_plugin", "llava", "lmms_eval"}
    tops = {target.partition(".")[0] for name in MODULES for target in imports(name)}
    used = {canonicalize_name(DISTRIBUTIONS.get(top, top)) for top in tops - hosts - set(sys.stdlib_module_names)}
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["project"]["dependencies"]}
    optional = {canonicalize_name(Requirement(text).name) for text in extras["eval"]}
    assert used - declared - optional == set()
    assert declared - used - set(NEEDED_BY_OTHERS) == set()
    assert set(NEEDED_BY_OTHERS) <= declared


def test_the_door_opens_on_what_it_names_and_imports_nothing_before() -> None:
    import vitask_plugin

    script = "import sys, vitask_plugin; print(sorted({'torch', 'transformers', 'timm'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
    for name in vitask_plugin.__all__:
        assert getattr(vitask_plugin, name) is not None and (name == "__version__" or name in vitask_plugin.__doc__)
    with pytest.raises(AttributeError, match="Nothing"):
        vitask_plugin.Nothing  # noqa: B018


def test_every_package_is_installed() -> None:
    mapped = {name: folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vitask_plugin").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages | set(mapped)
    for folder in mapped.values():
        assert (ROOT / folder / "__init__.py").is_file()


def test_flags_are_frozen() -> None:
    assert {field.name: field.default for field in fields(VITaskArguments)} == FLAGS
    assert all(field.metadata.get("help") for field in fields(VITaskArguments))


# What a VITaskArguments object is called; its own checks (`self.vitask_ep`) are no use of a flag.
ARGUMENTS = ("vitask", "self.vitask", "arguments", "self.arguments", "vitask_arguments", "self.vitask_arguments")


def flags_read(tree: ast.Module) -> set[str]:
    """Attributes that are read, not set, of what is called as in `ARGUMENTS`."""
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load))
    return {node.attr for node in attributes if ast.unparse(node.value) in ARGUMENTS}


def test_every_flag_is_read() -> None:
    assert not flags_read(ast.parse("self.vitask; self._llava.vitask_connector(x); vitask.vitask_connector = 'linear'"))
    read = set().union(*(flags_read(tree) for tree in MODULES.values()))
    assert set(FLAGS) - read == set()


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_loaded_that_can_run_code(name: str) -> None:
    for node in ast.walk(MODULES[name]):
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called(node) == "torch.load":
            assert keywords.get("weights_only") == "True", f"line {node.lineno}: torch.load without weights_only=True"
        assert called(node) not in ("pickle.load", "pickle.loads", "joblib.load", "eval", "exec"), f"line {node.lineno}"
        assert keywords.get("trust_remote_code") in (None, "False"), f"line {node.lineno}: trust_remote_code"
        assert keywords.get("allow_pickle") in (None, "False"), f"line {node.lineno}: allow_pickle"


def tracked() -> list[str]:
    """Files of the project as git sees them: tracked, or new and not ignored."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted(name for name in set(listed) if (ROOT / name).is_file())


def test_every_file_opens_with_what_it_is() -> None:
    sources = [name for name in tracked() if name.endswith(".py")]
    assert len(sources) > 30
    bare = [name for name in sources if not ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8")))]
    assert bare == []


def readme_tree() -> list[str]:
    """Paths or patterns of the block under "The tree" in README.md: two spaces a level, then what the file is."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^#+ The tree\n.*?^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, 'README.md has no fenced block under the heading "The tree"'
    found, folders = [], []
    for line in block[1].splitlines():
        entry = re.match(r"^((?:  )*)(\S+)(?: +(\S.*))?$", line)
        assert entry, f"not `name  what it is`: {line!r}"
        depth, name = len(entry[1]) // 2, entry[2]
        folders = folders[:depth]
        assert len(folders) == depth, f"indented below nothing: {line!r}"
        if name.endswith("/"):
            folders.append(name)
        else:
            assert entry[3], f"says nothing about the file: {line!r}"
            found.append("".join(folders) + name)
    return found


def test_readme_tree_is_the_tree() -> None:
    lines = readme_tree()
    files = [name for name in tracked() if not name.endswith("__init__.py")]
    matches = {name: [line for line in lines if fnmatch.fnmatchcase(name, line)] for name in files}
    assert {name: found for name, found in matches.items() if len(found) != 1} == {}
    assert [line for line in lines if not any(line in found for found in matches.values())] == []
