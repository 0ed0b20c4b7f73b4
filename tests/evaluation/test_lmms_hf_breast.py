"""`medmnist_breast` and its `_score` on every family, with exemplars and without; on one of them by the real command.

What it logs is held against the stock class and processor of a checkpoint's folder alone: a forward for each label, and
`generate`; an exemplar is put into them by hand.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from evaluating import TASKS
from lmms_output import write_file
from PIL import Image
from trained import Trained, make_trained, replace_connector

from vitask_plugin.data.drawn import task_texts
from vitask_plugin.data.instructions import instruction, label_set, response
from vitask_plugin.hf.tiny import FAMILIES, make_tiny
from vitask_plugin.method.reference import embedded_as, unused_token
from vitask_plugin.record.connector_file import load_connector
from vitask_plugin.report import read_results
from vitask_plugin.tsm.model import TSM

BREAST = label_set("breastmnist")
QUESTION = instruction(BREAST.modality, BREAST.choices)
ANSWERS = [response(BREAST.choices, label) for label in range(len(BREAST.choices))]
TASK_NAMES = (BREAST.task, f"{BREAST.task}_score")
IMAGES, NEW = 6, 12  # test images, and tokens of an answer
BY_COMMAND = "qwen3_vl"  # a start of lmms-eval takes longer than all questions; what it runs is `simple_evaluate`


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """breastmnist.npz, whose images are grey, of 6 drawn ones a split."""
    root = tmp_path_factory.mktemp("medmnist")
    write_file(root, BREAST.flag, IMAGES)
    with np.load(root / "breastmnist.npz") as file:
        arrays = {name: values[..., 0] if values.ndim == 4 else values for name, values in file.items()}
    np.savez(root / "breastmnist.npz", **arrays)
    return root


@dataclass(frozen=True)
class Stock:
    """A checkpoint as transformers' own classes load it, and what makes exemplars."""

    folder: Path
    tsm_folder: Path

    @cached_property
    def model(self) -> Any:
        return transformers.AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()

    @cached_property
    def processor(self) -> Any:
        return transformers.AutoProcessor.from_pretrained(self.folder)

    @cached_property
    def tsm(self) -> TSM:
        return TSM.load(self.tsm_folder)

    @torch.no_grad()
    def exemplar(self, image: Image.Image) -> torch.Tensor:
        """[1, D]"""
        return load_connector(self.folder)(self.tsm(self.tsm.preprocess(image)[None]).pooled)

    def inputs(self, image: Image.Image, question: str, answer: str | None = None) -> dict[str, torch.Tensor]:
        """A question up to where its answer starts, or with it and the token that ends it."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        if answer is None:
            text = self.processor.apply_chat_template(chat, add_generation_prompt=True)
        else:
            chat.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            text = self.processor.apply_chat_template(chat).rstrip()
            if text.endswith(answer):  # a template that ends an answer with nothing
                text += self.processor.tokenizer.eos_token
        bos = self.processor.tokenizer.bos_token
        own = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        return dict(self.processor(text=[text], images=[[image]], return_tensors="pt", **own))

    def with_exemplar(self, inputs: dict[str, torch.Tensor], image: Image.Image) -> dict[str, torch.Tensor]:
        """A token of no meaning stands behind all that two questions about an image have in common."""
        ids, other = inputs["input_ids"][0], self.inputs(image, "Why?")["input_ids"][0]
        shorter = min(len(ids), len(other))
        end = int((ids[:shorter] != other[:shorter]).nonzero()[0])
        put = {"input_ids": unused_token(ids), "attention_mask": 1}
        return {
            name: torch.cat([value[:, :end], value.new_full((1, 1), put.get(name, 0)), value[:, end:]], 1)
            if value.shape[:2] == (1, len(ids))
            else value
            for name, value in inputs.items()
        }

    @torch.no_grad()
    def log_likelihood(self, image: Image.Image, answer: str, prompted: bool) -> float:
        """Nats, by one forward of the whole conversation."""
        inputs, asked = self.inputs(image, QUESTION, answer), self.inputs(image, QUESTION)["input_ids"][0]
        count = inputs["input_ids"].shape[1] - len(asked)
        wanted = inputs["input_ids"][0, -count:]
        assert torch.equal(inputs["input_ids"][0, :-count], asked) and count > 2
        exemplar, token = None, unused_token(inputs["input_ids"][0])
        if prompted:
            inputs, exemplar = self.with_exemplar(inputs, image), self.exemplar(image)
        with embedded_as(self.model.get_input_embeddings(), token, exemplar):
            logits = self.model(**inputs).logits[0, -count - 1 : -1]
        return -float(torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum"))

    @torch.no_grad()
    def answer(self, image: Image.Image, prompted: bool) -> str:
        """By the stock class' own `generate`."""
        inputs = self.inputs(image, QUESTION)
        exemplar, token = None, unused_token(inputs["input_ids"][0])
        if prompted:
            inputs, exemplar = self.with_exemplar(inputs, image), self.exemplar(image)
        with embedded_as(self.model.get_input_embeddings(), token, exemplar):
            found = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        said = found[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(said, skip_special_tokens=True).strip()


def untie(folder: Path) -> None:
    """Gives a tiny model a head of its own: random weights that are also the embeddings say each token again and again.
    No special token is said: the stock forward would look for an image at its own."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    special = transformers.AutoTokenizer.from_pretrained(folder).added_tokens_decoder
    weight = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[list(special)] = 0
    model.lm_head.weight = torch.nn.Parameter(weight)
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.save_pretrained(folder)


def run_the_command(folder: Path, trained: Trained, root: Path) -> dict[str, list[dict[str, Any]]]:
    """With exemplars. Each task's samples, as they are logged."""
    words = [
        "--model",
        "vitask_hf",
        "--model_args",
        f"pretrained={trained.checkpoint},tsm={trained.tsm}",
        "--device",
        "cpu",
    ]
    words += ["--tasks", ",".join(TASK_NAMES), "--include_path", str(TASKS), "--batch_size", "4"]
    words += ["--gen_kwargs", f"max_new_tokens={NEW}", "--log_samples", "--output_path", str(folder)]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lmms-eval")), *words],
        env={**os.environ, "MEDMNIST_ROOT": str(root), "MEDMNIST_ALLOW_MODIFIED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for task in TASK_NAMES:
        assert f"exemplars: {IMAGES} of {IMAGES} documents of {task!r}" in done.stdout
    results = read_results(folder)  # as `vitask report` does
    assert set(results) == set(TASK_NAMES)
    assert [len(result.answers) for result in results.values()] == [IMAGES, IMAGES]
    logs = {task: next(folder.rglob(f"*_samples_{task}.jsonl")) for task in TASK_NAMES}
    return {task: [json.loads(line) for line in log.read_text().splitlines()] for task, log in logs.items()}


def run_the_harness(model_args: str, root: Path) -> dict[str, list[dict[str, Any]]]:
    """The same in this process."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(root))
        patch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
        found = simple_evaluate(
            model="vitask_hf",
            model_args=model_args,
            tasks=list(TASK_NAMES),
            batch_size=4,
            device="cpu",
            gen_kwargs=f"max_new_tokens={NEW}",
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        )
    samples = found["samples"]
    for sample in samples[BREAST.task]:
        (sample["filtered_resps"],) = sample["filtered_resps"]  # the command writes the one answer
    return samples


def strengthen(folder: Path) -> None:
    """So that an exemplar has a part in every answer, also beside many image tokens."""
    connector = load_connector(folder)
    with torch.no_grad():
        for weight in connector.parameters():
            weight.mul_(3)
    replace_connector(folder, connector, connector.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_both_tasks_with_exemplars_and_without(family: str, root: Path, tmp_path: Path) -> None:
    plain = make_tiny(tmp_path / "plain", family=family, texts=task_texts(BREAST), seed=0)
    untie(plain)
    trained = make_trained(tmp_path, plain, "cls", BREAST)
    strengthen(trained.checkpoint)
    stock = Stock(trained.checkpoint, trained.tsm)
    with np.load(root / "breastmnist.npz") as file:
        images = [Image.fromarray(pixels).convert("RGB") for pixels in file["test_images"]]
        labels = file["test_labels"][:, 0].tolist()
    scores, words = {}, {}
    for prompted in (True, False):
        if prompted and family == BY_COMMAND:
            found = run_the_command(tmp_path / "out", trained, root)
        else:
            model_args = f"pretrained={trained.checkpoint}" + (f",tsm={trained.tsm}" if prompted else "")
            found = run_the_harness(model_args, root)
        spoken, scored = ([sample["n"] | sample for sample in found[task]] for task in TASK_NAMES)
        assert [sample["label"] for sample in spoken] == [sample["label"] for sample in scored] == labels
        scores[prompted] = np.array([sample["log_likelihoods"] for sample in scored])
        words[prompted] = [sample["filtered_resps"] for sample in spoken]
        expected = [[stock.log_likelihood(image, answer, prompted) for answer in ANSWERS] for image in images]
        np.testing.assert_allclose(scores[prompted], expected, rtol=1e-5, atol=0)
        assert words[prompted] == [stock.answer(image, prompted) for image in images]
        # Each image counts, and words come out.
        assert len({*np.diff(scores[prompted])[:, 0].round(4)}) == IMAGES
        assert len({*words[prompted]}) > 1
    assert np.abs(scores[True] - scores[False]).max(axis=1).min() > 1e-2
    assert words[True] != words[False]
