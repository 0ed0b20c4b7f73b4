"""The house rules that a machine can check: who imports whom, frozen flags, lists of files, links, safe loading."""

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
    ("errors", "formats", "files", "model_folder", "options", "arguments", "calibration_error", "method"),
    ("data", "reading"),
    ("tsm", "record"),
    ("inference", "deepspeed", "sharing"),
    ("training",),
    ("llava", "hf"),
    ("evaluation",),
    ("specialist",),
    ("serve",),
    ("report",),
    (
        "eval_tasks",
        "estimate_memory",
        "calibrate",
        "calibrate_tables",
        "merge",
        "stages",
        "connector_fit",
        "doctor",
        "judge_tsm",
        "write_card",
        "push",
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
            if parts[0] == "upstream":  # of another repository, and not installed
                continue
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


def test_a_specialist_needs_no_harness() -> None:
    """Nothing of the extra `eval` is imported by what it is made of, however far down."""
    found, ahead = set(), fnmatch.filter(MODULES, "vitask_plugin.specialist*")
    while ahead:
        found.add(name := ahead.pop())
        ahead += own_imports(name) - found
    assert "vitask_plugin.evaluation.hf_model" in found and "vitask_plugin.evaluation.llava_model" in found
    extra = {canonicalize_name(Requirement(one).name) for one in PROJECT["project"]["optional-dependencies"]["eval"]}
    tops = {(name, canonicalize_name(target.partition(".")[0])) for name in found for target in imports(name)}
    assert [(name, top) for name, top in tops if top in extra] == []


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
    names = [Requirement(text).name for extra in ("eval", "dicom", "serve") for text in extras[extra]]
    optional = set(map(canonicalize_name, names))
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


def test_one_version_and_checks_that_exist() -> None:
    """CITATION.cff has the package's version; the workflow runs `.ci/run`, and hooks run programs of `make setup`."""
    import yaml

    from vitask_plugin import __version__

    read = {name: yaml.safe_load((ROOT / name).read_text()) for name in tracked() if name.endswith((".yml", ".cff"))}
    read[".pre-commit-config.yaml"] = hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert read["CITATION.cff"]["version"] == __version__ == PROJECT["project"]["version"]
    steps = read[".github/workflows/check.yml"]["jobs"]["check"]["steps"]
    assert steps[-1] == {"run": ".ci/run"} and (ROOT / ".ci/run").stat().st_mode & 0o111
    entries = [hook["entry"].split()[0] for repository in hooks["repos"] for hook in repository["hooks"]]
    dev = {Requirement(text).name for text in PROJECT["project"]["optional-dependencies"]["dev"]}
    assert {entry.removeprefix(".venv/bin/") for entry in entries} <= {"python", *dev}


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


def test_the_list_of_files_is_the_tree(tmp_path: Path) -> None:
    """docs/files.md is what `make files` writes; a file that says nothing of itself is named."""
    from list_files import WORDS, page

    assert (ROOT / "docs/files.md").read_text(encoding="utf-8") == page(), "run: make files"
    assert [one for one in WORDS if not fnmatch.filter(tracked(), one)] == [], "words for files that are not there"
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "said.py").write_text('"""One thing.\n\nMore of it."""\n')
    assert "- [`said.py`](../said.py): One thing.\n" in page(tmp_path)
    (tmp_path / "silent.py").write_text("a = 1\n")
    with pytest.raises(ValueError, match=r"nothing is known about silent\.py; give"):
        page(tmp_path)


def test_readme_maps_the_folders() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200, "what does not fit belongs in docs/"
    block = re.search(r"^## Where things are\n.*?^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, 'README.md has no fenced block under the heading "Where things are"'
    named = []
    for line in block[1].splitlines():
        entry = re.match(r"^(  )?((?:[\w.]+/ ?)+)(?: +\S.*)?$", line)
        assert entry, f"not `folder/ ...  what is in it`: {line!r}"
        named += [f"{'vitask_plugin/' if entry[1] else ''}{name.strip('/')}" for name in entry[2].split()]
    folders = {"/".join(parts[:2]) if parts[0] == "vitask_plugin" else parts[0] for parts in map(parts_of, tracked())}
    assert sorted(named) == sorted({*folders, "vitask_plugin"} - {""})


def parts_of(name: str) -> list[str]:
    """Folders of a file of the project."""
    return name.split("/")[:-1] or [""]


LINK = re.compile(r"\]\(([^()\s]+)\)|^\[[^]]+\]: (\S+)", re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in tracked() if name.endswith(".md")])
def test_links_lead_somewhere(name: str) -> None:
    """Files are there, and headings too where one is named; pages of others are not looked at."""
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in (found[0] or found[1] for found in LINK.findall(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{link} is not there"
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    pages = [name.removeprefix("docs/") for name in tracked() if fnmatch.fnmatch(name, "docs/*.md")]
    assert [name for name in pages if name != "README.md" and f"]({name})" not in index] == []
