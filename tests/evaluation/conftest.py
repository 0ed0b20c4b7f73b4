"""A small trained checkpoint, and the model of the harness on it: with exemplars, for any task, and without."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluating import VARIANTS, load_tasks, open_model
from trained import Trained, make_trained


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"), tiny_checkpoint, "cls")


@pytest.fixture(scope="module")
def prompted(trained: Trained, drawn_root: Path) -> SimpleNamespace:
    model = open_model(trained.checkpoint, tsm=trained.tsm)
    return SimpleNamespace(model=model, tasks=load_tasks(model, drawn_root, *VARIANTS))


@pytest.fixture(scope="module")
def everywhere(trained: Trained, prompted: SimpleNamespace) -> SimpleNamespace:
    """With exemplars for questions of any task."""
    return SimpleNamespace(model=open_model(trained.checkpoint, tsm=trained.tsm, ep="all"), tasks=prompted.tasks)


@pytest.fixture(scope="module")
def unprompted(trained: Trained, drawn_root: Path) -> SimpleNamespace:
    model = open_model(trained.checkpoint, tsm=trained.tsm, ep=False)
    return SimpleNamespace(model=model, tasks=load_tasks(model, drawn_root, *VARIANTS))
