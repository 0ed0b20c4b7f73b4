"""What the model of the harness is given: labels, arguments, TSM and template that fit the checkpoint, or a refusal."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluating import load_tasks, open_model
from trained import Trained, make_tsm

from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.model_args import as_device


def test_another_label_set_is_refused_before_any_answer(
    trained: Trained, drawn_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(trained.checkpoint, tmp_path / "llava-other")
    record = json.loads((other / "vitask.json").read_text())
    record["tasks"][DRAWN.task] = ["oak", "ash"]
    (other / "vitask.json").write_text(json.dumps(record))
    model = open_model(other)
    tasks = load_tasks(model, drawn_root, "vitask_drawn", "vitask_drawn_score")
    monkeypatch.setattr(model, "_prompts", lambda *_: pytest.fail("the model was asked"))
    for ask_for in (
        lambda: model.generate_until(tasks["vitask_drawn"].instances),
        lambda: model.loglikelihood(tasks["vitask_drawn_score"].instances),
    ):
        with pytest.raises(SystemExit) as stopped:
            ask_for()
        assert "['oak', 'ash']" in stopped.value.code
        assert repr(list(DRAWN.choices)) in stopped.value.code


@pytest.mark.parametrize(
    ("model_args", "sentence"),
    [
        ({"image_size": 224}, "image_size=224 is unknown; leave it out, or give image_size=any"),
        ({"ep": True}, "ep=True needs the task-specific model"),
        ({"ep": "maybe"}, "neither True nor False nor all"),
        ({"ep": "all"}, "ep=True needs the task-specific model"),
        ({"dtype": "int4"}, "dtype='int4' is unknown"),
        ({"conv_template": "v9"}, "conv_template='v9' is unknown"),
        ({"tms": "x"}, "'tms' unknown"),
        ({"swap": "maybe"}, "swap='maybe' is unknown; leave it out, or give swap=force"),
        ({"trust_tsm_code": "perhaps"}, "trust_tsm_code='perhaps' is neither True nor False"),
        ({"connector": "."}, "connector='.' is of use with its tsm=DIR only"),
        ({"connector": ".", "tsm": ".", "ep": False}, "add tsm=DIR to --model_args and leave ep=False out"),
        ({"tsm": "nowhere"}, "tsm= in --model_args 'nowhere' does not exist; give a folder"),
        ({"tsm": 5}, "tsm=5 in --model_args is taken for a int, not for a folder; write tsm=./5"),
        ({"tsm": "1e3"}, "tsm=1000.0 in --model_args is taken for a float"),
        ({"connector": 5, "tsm": "."}, "connector=5 in --model_args"),
        ({"model_base": 5}, "model_base=5 in --model_args"),
        ({"checkpoint": True}, "pretrained=True in --model_args is taken for a bool"),
        ({"max_new_tokens": "x"}, "max_new_tokens='x' is not a positive whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 is"),
        ({"max_new_tokens": True}, "max_new_tokens=True is"),
        ({"contrast": "nan"}, "contrast=nan is no weight"),
        ({"pretrained": "nowhere"}, "pretrained='nowhere' in --model_args is no local folder"),
        ({"model_base": "owner/name"}, "model_base='owner/name' in --model_args is no local folder"),
    ],
)
def test_bad_model_arguments_are_one_sentence(trained: Trained, model_args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        open_model(**{"checkpoint": trained.checkpoint, **model_args})
    assert stopped.value.code.startswith("vitask: error: ")
    assert sentence in stopped.value.code
    assert "\n" not in stopped.value.code


def test_exemplars_need_a_connector(trained: Trained, tiny_checkpoint: Path) -> None:
    with pytest.raises(SystemExit, match="cannot be prompted with exemplars"):
        open_model(tiny_checkpoint, tsm=trained.tsm)


@pytest.mark.parametrize("name", ["meta", "gpu", 5])
def test_a_device_that_is_none_is_one_sentence(name: Any) -> None:
    with pytest.raises(VITaskError, match=f"device='{name}' is unknown; give cpu, cuda or cuda:N"):
        as_device(name, 0)


def test_another_tsm_is_refused_with_the_command_that_aligns_it(trained: Trained, tmp_path: Path) -> None:
    """Of another width or of the same: to the connector both are noise."""
    own = json.loads((trained.tsm / "tsm.json").read_text())["sha256"][:12]
    for name in ("test_resnet", "test_vit"):
        tsm = make_tsm(tmp_path / name, seed=5, name=name)
        with pytest.raises(SystemExit) as stopped:
            open_model(trained.checkpoint, tsm=tmp_path / name)
        said = str(stopped.value)
        assert tsm.hash[:12] in said and own in said and "\n" not in said
        assert (
            f"vitask connector align --checkpoint {trained.checkpoint} --from-tsm tsm --tsm {tmp_path / name}" in said
        )
        assert ("swap=force" in said) == (name == "test_vit"), "another width cannot be forced"
    with pytest.raises(SystemExit, match="connector takes"):
        open_model(trained.checkpoint, tsm=tmp_path / "test_resnet", swap="force")


def test_a_forced_swap_is_another_model_and_logged(
    trained: Trained, prompted: SimpleNamespace, drawn_root: Path, tmp_path: Path
) -> None:
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING")
    make_tsm(tmp_path, seed=5)
    model = open_model(trained.checkpoint, tsm=tmp_path, swap="force")
    logger.remove(sink)
    assert any("plug-and-play" in line and "expect wrong answers" in line for line in lines)
    instances = prompted.tasks["vitask_drawn_score"].instances[:4]
    model.task_dict = prompted.model.task_dict
    assert model.loglikelihood(instances) != prompted.model.loglikelihood(instances)


@pytest.mark.parametrize(
    ("version", "given", "used", "warned"),
    [
        (None, None, "vicuna_v1", False),
        (None, "mpt", "mpt", False),
        ("v1", None, "v1", False),
        ("mpt", None, "mpt", False),
        ("v0", None, "vicuna_v1", False),  # upstream's default --version trains on the default template
        ("v1", "vicuna_v1", "v1", False),
        ("v1", "mpt", "mpt", True),
        ("mpt", "v1", "v1", True),
    ],
)
def test_the_template_is_that_of_training(
    version: str | None, given: str | None, used: str, warned: bool, trained: Trained, tmp_path: Path
) -> None:
    from llava.conversation import conv_templates
    from loguru import logger

    checkpoint = tmp_path / "llava-version"
    shutil.copytree(trained.checkpoint, checkpoint, copy_function=os.link)
    record = json.loads((checkpoint / "vitask.json").read_text())
    record["version"] = version
    if version is None:
        del record["version"]
    (checkpoint / "vitask.json").unlink()
    (checkpoint / "vitask.json").write_text(json.dumps(record))
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    model = open_model(checkpoint, **({"conv_template": given} if given else {}))
    logger.remove(sink)
    assert model.template is conv_templates[used]
    warnings = [line for line in lines if "is not the template of training" in line]
    assert len(warnings) == warned
    assert all(repr(given) in line and repr(version) in line for line in warnings)
