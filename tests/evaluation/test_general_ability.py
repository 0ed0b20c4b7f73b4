"""General ability: pope, a task of lmms-eval's own, on local rows with `vitask_llava`, and its place in the report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from evaluating import open_model
from loguru import logger
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score
from trained import Trained, make_trained, replace_connector

from vitask_plugin.cli import main
from vitask_plugin.llava.tiny import TinyLlava, make_tiny_checkpoint

TASKS = Path(__file__).parents[2] / "eval_tasks"
QUESTION = "Is there a dog in the image?"
INSTRUCTION = "\nAnswer the question using a single word or phrase."  # the task's own
TRUTH = ["yes", "no", "yes", "yes", "no", "yes"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """What the task reads of lmms-lab-encoder/POPE, with drawn images."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(TRUTH), 32, 32, 3), dtype=np.uint8)
    return [
        {"question_id": str(number), "question": QUESTION, "answer": answer, "image": Image.fromarray(image)}
        for number, (answer, image) in enumerate(zip(TRUTH, pixels, strict=True))
    ]


@pytest.fixture(scope="module")
def llava(
    tmp_path_factory: pytest.TempPathFactory, tiny_llava: TinyLlava, drawn_texts: list[str], rows: list[dict[str, Any]]
) -> Path:
    """A LLaVA checkpoint that says "yes" to some of the images and "no" to others.

    A random one says neither, so that every figure of the task would be 0. Here the scores of the two words are made
    opposite, +-w h, of the last hidden state h, with w such that the images of `rows` lie on both sides of 0.
    """
    texts = [*drawn_texts, *[QUESTION + INSTRUCTION, "yes", "no"] * 20]
    folder = tmp_path_factory.mktemp("general") / "tiny-llava-yes-or-no"
    make_tiny_checkpoint(folder, texts=texts, seed=0, tower=tiny_llava.tower, hidden_size=64, layers=2)
    states = torch.stack([last_state(folder, row["image"]) for row in rows]).double()
    centre = states.mean(0)
    along = torch.linalg.svd(states - centre, full_matrices=False).Vh[0]
    w = along - centre * torch.quantile(states @ along, 0.5) / centre.square().sum()
    tokenizer, _, _ = upstream(folder)
    weights = load_file(folder / "model.safetensors")
    head = torch.zeros_like(weights["lm_head.weight"])
    for word, sign in (("yes", 1), ("no", -1)):
        (token,) = tokenizer(word, add_special_tokens=False).input_ids
        head[token] = sign * w
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def upstream(folder: Path) -> tuple[Any, Any, Any]:
    """Tokenizer, model and image processor, by stock LLaVA's class (its own loader rounds to float16)."""
    from vitask_plugin.llava import compat

    compat.prepare()
    from llava.model import LlavaLlamaForCausalLM
    from transformers import AutoTokenizer

    model = LlavaLlamaForCausalLM.from_pretrained(folder).eval()
    tower = model.get_vision_tower()
    tower.load_model()
    return AutoTokenizer.from_pretrained(folder, use_fast=False), model, tower.image_processor


def asked(folder: Path, image: Image.Image) -> tuple[Any, Any, dict[str, Any]]:
    """Tokenizer, model, and what stock LLaVA's own code feeds it for this image and the question."""
    tokenizer, model, processor = upstream(folder)
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token

    conversation = conv_templates["vicuna_v1"].copy()
    conversation.append_message(conversation.roles[0], f"<image>\n{QUESTION}{INSTRUCTION}")
    conversation.append_message(conversation.roles[1], None)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
    return tokenizer, model, {"ids": ids, "images": process_images([image], processor, model.config)}


@torch.no_grad()
def last_state(folder: Path, image: Image.Image) -> torch.Tensor:
    _, model, inputs = asked(folder, image)
    prepared = model.prepare_inputs_labels_for_multimodal(inputs["ids"], None, None, None, None, inputs["images"])
    return model.get_model()(inputs_embeds=prepared[4]).last_hidden_state[0, -1]


@torch.no_grad()
def stock_answer(folder: Path, image: Image.Image) -> str:
    tokenizer, model, inputs = asked(folder, image)
    found = model.generate(
        inputs["ids"], images=inputs["images"], image_sizes=[image.size], do_sample=False, max_new_tokens=1
    )
    return tokenizer.decode(found[0], skip_special_tokens=True).strip()


def write_pope(folder: Path, rows: list[dict[str, Any]]) -> None:
    """`load_dataset` takes a local folder of that name for the hub's data set."""
    data = folder / "lmms-lab-encoder" / "POPE" / "data"
    data.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(data / "test-00000-of-00001.parquet")


def test_a_task_of_the_harness_own_beside_ours(llava, rows, drawn_root, tmp_path, capsys):
    """In one folder with our task, as the report takes it; answers are stock LLaVA's, figures follow from them."""
    write_pope(tmp_path, rows)
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "vitask_llava", "--model_args", f"pretrained={llava}"),
        *("--device", "cpu", "--batch_size", 4, "--include_path", TASKS, "--tasks", "pope,vitask_drawn"),
        *("--gen_kwargs", "max_new_tokens=1", "--output_path", tmp_path / "results", "--log_samples"),
    ]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_DATASETS_CACHE": str(tmp_path / "hf" / "datasets"),
            "MEDMNIST_ROOT": str(drawn_root),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    found = list((tmp_path / "results").rglob("*_results.json"))
    assert done.returncode == 0 and len(found) == 1, done.stdout
    (path,) = (tmp_path / "results").rglob("*_samples_pope.jsonl")
    samples = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["input"] for sample in samples] == [QUESTION + INSTRUCTION] * len(rows)
    said = [sample["filtered_resps"] for sample in samples]
    assert said == [stock_answer(llava, row["image"]) for row in rows]
    assert set(said) == {"yes", "no"}

    figures = json.loads(found[0].read_text())["results"]["pope"]
    expected = {
        "accuracy": accuracy_score(TRUTH, said),
        "precision": precision_score(TRUTH, said, pos_label="yes"),
        "recall": recall_score(TRUTH, said, pos_label="yes"),
        "f1_score": f1_score(TRUTH, said, pos_label="yes"),
    }
    for name, value in expected.items():
        assert figures[f"pope_{name},none"] == pytest.approx(value), name

    assert main(["report", str(tmp_path / "results"), "--out", str(tmp_path / "report.html"), "--markdown"]) == 0
    page = (tmp_path / "report.md").read_text().replace("\\_", "_")
    for name, value in expected.items():
        assert f"| results | pope | pope_{name} | {value:.3f} |" in page, page


# With a TSM --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llava) -> Trained:
    """The same checkpoint as after training on the drawn task, with an exemplar that nobody can overlook."""
    from vitask_plugin.record import connector_file

    found = make_trained(tmp_path_factory.mktemp("trained"), llava, "cls")
    connector = connector_file.load_connector(found.checkpoint)
    replace_connector(
        found.checkpoint, connector, {name: 20 * weight for name, weight in connector.state_dict().items()}
    )
    return found


@pytest.fixture(scope="module")
def pope(tmp_path_factory, rows) -> Any:
    """The harness' own task object, and scores of both words to the same documents."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    folder = tmp_path_factory.mktemp("pope")
    write_pope(folder, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        (task,) = get_task_dict(["pope"], TaskManager()).values()
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return task


def answered(pope: Any, checkpoint: Path, **model_args: Any) -> tuple[list[str], list[float], str]:
    """Answers, losses of "yes" and "no" (in nats), and the log."""
    from lmms_eval.api.instance import Instance

    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    model = open_model(checkpoint, **model_args)
    model.task_dict["pope"] = pope.dataset
    answers = model.generate_until([_short(request) for request in pope.instances])
    scored = [
        Instance("loglikelihood", (request.args[0], word, *request.args[2:]), 0, request.metadata)
        for request in pope.instances
        for word in ("yes", "no")
    ]
    losses = [loss for loss, _ in model.loglikelihood(scored)]
    logger.remove(sink)
    return answers, losses, "".join(lines)


def _short(request: Any) -> Any:
    asked = (request.args[0], {"max_new_tokens": 1}, *request.args[2:])
    return SimpleNamespace(args=asked, request_type=request.request_type)


def test_general_questions_get_no_exemplar(pope, trained):
    """They are of no task that the checkpoint was trained on: with a TSM they are answered as without, bit for bit."""
    tsm = {"tsm": trained.tsm}
    plain_answers, plain, _ = answered(pope, trained.checkpoint, **tsm, ep=False)
    answers, losses, log = answered(pope, trained.checkpoint, **tsm)
    assert (answers, losses) == (plain_answers, plain)
    assert log.count("exemplars: 0 of 6 documents of 'pope'; the checkpoint was trained on vitask_drawn (ep=all") == 1
    _, forced, log = answered(pope, trained.checkpoint, **tsm, ep="all")
    assert log.count("exemplars: 6 of 6 documents of 'pope', whatever they ask (ep=all)") == 1
    margins = (np.subtract(each[::2], each[1::2]) for each in (forced, plain))  # of "no" over "yes"
    assert np.abs(np.subtract(*margins)).mean() > 0.02
