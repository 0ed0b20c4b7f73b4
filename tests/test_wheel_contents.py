"""`tools/try_wheel.py` looks for a data file of every kind that a folder of the package holds."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_kind_of_data_file_is_looked_for_in_the_wheel() -> None:
    spec = importlib.util.spec_from_file_location("try_wheel", ROOT / "tools" / "try_wheel.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    known = {path.relative_to(ROOT) for path in (ROOT / "vitask_plugin").rglob("*") if path.is_file()}
    data = {path for path in known if path.suffix not in (".py", ".pyc")}
    looked_for = {(Path(name).parent, Path(name).suffix) for name in command.IN_WHEEL}
    assert {path.as_posix() for path in data if (path.parent, path.suffix) not in looked_for} == set()
