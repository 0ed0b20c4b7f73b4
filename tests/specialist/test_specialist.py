"""`Specialist`: the probabilities of lmms-eval's own `_score` run on the same images, on both hosts, with exemplars and
without; their average; images that cannot be read.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluating import TASKS
from trained import Trained, make_trained

from vitask_plugin import Specialist
from vitask_plugin.data.instructions import DRAWN

SCORES = f"{DRAWN.task}_score"


@pytest.fixture(scope="module", params=["llava", "hf"])
def trained(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_hf: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    plain = tiny_checkpoint if request.param == "llava" else tiny_hf("qwen3_vl").folder
    return make_trained(tmp_path_factory.mktemp(request.param), plain, "cls")


@pytest.fixture(scope="module")
def files(drawn_data: Path) -> list[Path]:
    return [drawn_data / "images" / sample["image"] for sample in json.loads((drawn_data / "test.json").read_text())]


def by_lmms_eval(trained: Trained, root: Path, **more: Any) -> list[dict[str, Any]]:
    """What the harness logs of each image."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    host = "vitask_llava" if "LlavaLlama" in (trained.checkpoint / "config.json").read_text() else "vitask_hf"
    given = {"pretrained": trained.checkpoint, **more}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(root))
        found = simple_evaluate(
            model=host,
            model_args=",".join(f"{name}={value}" for name, value in given.items()),
            tasks=[SCORES],
            batch_size=3,
            device="cpu",
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        )
    return [sample["n"] for sample in sorted(found["samples"][SCORES], key=lambda sample: sample["doc_id"])]


def table(predictions: list[Any]) -> np.ndarray:
    return np.array([list(one.probabilities.values()) for one in predictions])


def test_probabilities_are_those_of_lmms_eval(trained: Trained, files: list[Path], drawn_root: Path) -> None:
    specialist = Specialist.load(trained.checkpoint, tsm=trained.tsm, device="cpu")
    assert specialist.classes == DRAWN.choices
    expected, found = {}, {}
    for ep, more in {False: {}, True: {"tsm": trained.tsm}}.items():
        logged = by_lmms_eval(trained, drawn_root, **more)
        expected[ep] = np.array([entry["probabilities"] for entry in logged])
        said = specialist.predict(files, ep=ep, batch_size=5)
        found[ep] = table(said)
        assert np.abs(found[ep] - expected[ep]).max() < 1e-6
        assert [one.label for one in said] == [DRAWN.choices[entry["prediction"]] for entry in logged]
        assert [one.image for one in said] == list(map(str, files))
        entropies = -(expected[ep] * np.log(expected[ep])).sum(axis=1)
        assert [one.entropy for one in said] == pytest.approx(entropies, abs=1e-5)
    assert np.abs(found[True] - found[False]).max() > 1e-3
    both = table(specialist.predict(files, ep="average", batch_size=4))
    assert np.abs(both - (expected[False] + expected[True]) / 2).max() < 1e-6
    assert np.array_equal(table(specialist.predict(files, batch_size=5)), found[True])
