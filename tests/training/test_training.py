"""Upstream's own `train()` with and without the VITask flags: full and LoRA, both stages, what is saved and resumed."""

import importlib.util
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ranks import launch
from runs import LORA, arguments, history, run, train, weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trained import record_connector

from vitask_plugin.files import sha256_file

# Upstream with the compatibility workarounds and nothing else: what a run without --vitask must reproduce.
# Both are seeded before: upstream initialises its projector and LoRA before its Trainer seeds.
SEED = "import transformers; transformers.set_seed(0)"
OURS = f"""{SEED}
from vitask_plugin.llava.train import main
main()
"""
UPSTREAM = f"""{SEED}
from vitask_plugin.llava import compat
compat.prepare()
from llava.train import train
compat.patch_script(vars(train))
train.train()
"""


def tree_hash(directory: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_llava, mixed_data, tsm_directory, feature_store):
    """Stage 1 and 2, full and LoRA, and a stage 1 branch by branch; two at a time."""
    root = tmp_path_factory.mktemp("runs")
    before = tree_hash(tiny_llava.tower) | tree_hash(tsm_directory)
    vitask = ["--vitask", "True", "--vitask_tsm", str(tsm_directory), "--vitask_features", str(feature_store)]

    def pair(kind: str, *flags: str) -> None:
        first, second = root / f"llava-{kind}-1", root / f"llava-{kind}-2"
        train(tiny_llava, mixed_data, first, *vitask, *flags)
        start = ["--vitask_connector_path", str(first)]
        if kind == "full":
            start += ["--model_name_or_path", str(first)]
        train(tiny_llava, mixed_data, second, *vitask, *flags, *start, "--vitask_stage", "2")

    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(pair, "full"),
            pool.submit(pair, "lora", *LORA),
            pool.submit(train, tiny_llava, mixed_data, root / "branches", *vitask, "--vitask_engine", "branches"),
        ]
        for job in jobs:
            job.result()
    assert tree_hash(tiny_llava.tower) | tree_hash(tsm_directory) == before, "the TSM or the vision tower changed"
    return root


@pytest.mark.compat
@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
def test_without_vitask_the_run_is_upstreams_bit_for_bit(lora, tmp_path, tiny_llava, mixed_data):
    commands = {"upstream": [sys.executable, "-c", UPSTREAM], "ours": [sys.executable, "-c", OURS]}
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(run, [*command, *arguments(tiny_llava, mixed_data, tmp_path / name, *lora)])
            for name, command in commands.items()
        ]
        for job in jobs:
            job.result()
    theirs, ours = history(tmp_path / "upstream"), history(tmp_path / "ours")
    assert len(theirs) == 4
    assert [entry["loss"] for entry in ours] == [entry["loss"] for entry in theirs]
    expected, found = weights(tmp_path / "upstream"), weights(tmp_path / "ours")
    assert expected.keys() == found.keys() and len(expected) > 4
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names == {path.name for path in (tmp_path / "upstream").iterdir()}


@pytest.mark.compat
def test_every_term_is_logged_at_every_step(runs):
    for kind in ("full", "lora"):
        for stage in (1, 2):
            log = history(runs / f"llava-{kind}-{stage}")
            assert len(log) == 4
            for entry in log:
                assert {"loss_vanilla", "loss_ep", "loss_rda", "response_accuracy", "response_accuracy_ep"} <= set(
                    entry
                )
                assert ({"loss_crt", "in_batch_negatives"} <= set(entry)) == (stage == 2)
                assert 0 <= entry["response_accuracy"] <= 1 and 0 <= entry["response_accuracy_ep"] <= 1


def test_packed_and_branches_give_the_same_curve_and_weights(runs):
    packed, branches = history(runs / "llava-full-1"), history(runs / "branches")
    for ours, reference in zip(packed, branches, strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    expected, found = weights(runs / "branches"), weights(runs / "llava-full-1")
    for name in expected:
        # AdamW divides by the gradient's own size, which enlarges rounding where the gradient is near zero.
        assert (found[name] - expected[name]).abs().max() < 2e-4, name


FLASH = """
from vitask_plugin.llava import compat
compat.prepare()
from vitask_plugin.llava.install import wrap
from llava.train.train import train
wrap(train)(attn_implementation="flash_attention_2")
"""


def test_cut_answers_are_counted_and_named_and_flash_attention_is_replaced(
    tmp_path, tiny_llava, mixed_data, feature_store
):
    """One question fills the whole length."""
    data = tmp_path / "data"
    shutil.copytree(mixed_data, data)
    samples = json.loads((data / "train.json").read_text())
    general = next(sample for sample in samples if sample["id"] == "general-0")
    general["conversations"][0]["value"] += " Analyze the weather." * 60
    (data / "train.json").write_text(json.dumps(samples))
    flags = ["--vitask", "True", "--vitask_features", str(feature_store), "--model_max_length", "300"]
    done = run([sys.executable, "-c", FLASH, *arguments(tiny_llava, data, tmp_path / "output", *flags)])
    assert done.stderr.count("sample 'general-0' has no answer token left to learn") == 1
    assert "sample 'general-1'" not in done.stderr
    assert done.stderr.count("sdpa instead of flash_attention_2") == 1
    log = history(tmp_path / "output")
    assert [round(entry["unanswered"] * 8) for entry in log if entry["unanswered"]] == [1]
    assert sum(entry["cut_branches"] > 0 for entry in log) == 1


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None,
    reason="--bits 4 needs a GPU and bitsandbytes",
)
def test_four_bit_weights_give_both_engines_one_curve(tmp_path, tiny_llava, mixed_data, feature_store):
    flags = ["--vitask", "True", "--vitask_features", str(feature_store), *LORA, "--bits", "4", "--use_cpu", "False"]
    for engine in ("packed", "branches"):
        train(tiny_llava, mixed_data, tmp_path / engine, *flags, "--bf16", "True", "--vitask_engine", engine)
    for ours, reference in zip(history(tmp_path / "packed"), history(tmp_path / "branches"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=0.05)


def test_stage_1_trains_the_connector_and_stage_2_leaves_it_alone(runs, mixed_data, tiny_llava, tmp_path):
    for kind in ("full", "lora"):
        first = load_file(runs / f"llava-{kind}-1" / "vitask_connector.safetensors")
        second = load_file(runs / f"llava-{kind}-2" / "vitask_connector.safetensors")
        assert all(torch.equal(first[name], second[name]) for name in first)
    full, lora = (load_file(runs / f"llava-{kind}-1" / "vitask_connector.safetensors") for kind in ("full", "lora"))
    assert any(not torch.equal(full[name], lora[name]) for name in full)  # it moved, and not in the same way


def test_the_language_model_learns_in_both_stages_and_the_vision_tower_never(runs, tiny_llava):
    tower = load_file(tiny_llava.tower / "model.safetensors")
    for kind in ("full", "lora"):
        first, second = weights(runs / f"llava-{kind}-1"), weights(runs / f"llava-{kind}-2")
        assert first.keys() == second.keys()
        changed = [name for name in first if not torch.equal(first[name], second[name])]
        assert len(changed) > 10
    for stage in (1, 2):
        saved = {name: weight for name, weight in weights(runs / f"llava-full-{stage}").items() if "tower" in name}
        assert len(saved) == len(tower)
        for name, weight in tower.items():
            same = [saved[other] for other in saved if other.endswith(f".{name}")]
            # Upstream holds the tower in half precision.
            assert len(same) == 1 and torch.equal(same[0], weight.half()), name


def test_lora_stage_2_starts_from_all_that_stage_1_learnt(runs, tmp_path, tiny_llava, mixed_data, feature_store):
    """With a learning rate of 0, stage 2 ends with the adapter and the projector that stage 1 ended with."""
    flags = ["--vitask", "True", "--vitask_features", str(feature_store), *LORA, "--vitask_stage", "2"]
    still = ["--learning_rate", "0", "--vitask_connector_path", str(runs / "llava-lora-1")]
    expected = weights(runs / "llava-lora-1")
    found = weights(train(tiny_llava, mixed_data, tmp_path / "llava-lora-2", *flags, *still))
    assert found.keys() == expected.keys() and not any("vitask" in name for name in found)
    assert any("lora_B" in name and weight.any() for name, weight in expected.items())
    assert any("mm_projector" in name for name in expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_processes_give_the_curve_of_one(runs, tmp_path, tiny_llava, mixed_data, feature_store):
    """Batch 8 on one process and batch 4 on each of two see the same samples in a step of stage 1."""
    flags = ["--vitask", "True", "--vitask_features", str(feature_store), "--per_device_train_batch_size", "4"]
    two = history(train(tiny_llava, mixed_data, tmp_path / "two", *flags, processes=2))
    one = history(runs / "llava-full-1")
    # The last step of one process has 6 samples; two processes fill it up to 8 with samples seen before.
    for ours, reference in list(zip(two, one, strict=True))[:-1]:
        for name in ("loss", "loss_vanilla", "loss_ep", "response_accuracy"):
            assert ours[name] == pytest.approx(reference[name], rel=1e-4), name


def heavier(checkpoint: Path, directory: Path) -> Path:
    """A copy with larger weights: the tiny model's own leave an exemplar without weight, and RDA all rounding."""
    shutil.copytree(checkpoint, directory)
    for name, factor in (("model.safetensors", 8), ("vitask_connector.safetensors", 4)):
        with safe_open(checkpoint / name, "pt") as opened:
            metadata = opened.metadata()
        changed = load_file(checkpoint / name)
        for weight in changed:
            if changed[weight].ndim > 1 and not any(part in weight for part in ("vision_tower", "embed", "projector")):
                changed[weight] = changed[weight] * factor
        save_file(changed, directory / name, metadata)
    record_connector(directory)
    return directory


def test_stage_2_has_one_curve_however_a_step_is_split(runs, tmp_path, tiny_llava, mixed_data, feature_store):
    """4 samples a step as batches of 4, 2 and 1 and on two processes: the same samples, negatives and terms."""
    first = str(heavier(runs / "llava-full-1", tmp_path / "llava-first"))
    flags = ["--vitask", "True", "--vitask_features", str(feature_store), "--vitask_stage", "2"]
    flags += ["--model_name_or_path", first, "--vitask_connector_path", first, "--learning_rate", "1e-4"]
    # Processes, batch of each, accumulation.
    splits = [(1, 4, 1), (1, 2, 2), (1, 1, 4), (2, 2, 1)]

    def curve(processes: int, batch: int, accumulation: int) -> list[dict]:
        output = tmp_path / f"{processes}-{batch}-{accumulation}"
        sizes = ["--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation)]
        train(tiny_llava, mixed_data, output, *flags, *sizes, processes=processes)
        # The last step has 2 samples; two processes fill it up to 4 with samples seen before.
        return history(output)[:-1]

    logs = {split: curve(*split) for split in splits}
    expected = logs[splits[0]]
    assert len(expected) == 7 and expected[0]["loss_vanilla"] > 1.1 * expected[-1]["loss_vanilla"]
    for split in splits[1:]:
        for step, (ours, reference) in enumerate(zip(logs[split], expected, strict=True)):
            for term in ("loss", "loss_vanilla", "loss_ep", "loss_rda", "loss_crt", "response_accuracy"):
                assert ours[term] == pytest.approx(reference[term], rel=1e-4), (split, step, term)
            assert reference["loss_rda"] > 1e-3 and reference["loss_crt"] > 1
    # Where each of them comes from differs: a row of the batch, or an extra one.
    shares = {split: sum(entry["in_batch_negatives"] for entry in log) / len(log) for split, log in logs.items()}
    assert shares[1, 1, 4] == 0 < shares[1, 2, 2] == shares[2, 2, 1] < shares[1, 4, 1] > 0.8


def test_questions_of_their_own_are_said_once_and_counted(runs, tmp_path, tiny_llava, mixed_data, feature_store):
    """Three samples with the patient's age in the question, and the two of several turns, one of them reworded."""
    data = tmp_path / "data"
    shutil.copytree(mixed_data, data)
    samples = json.loads((data / "train.json").read_text())
    for index in (1, 6, 7, 8):
        samples[index]["conversations"][0]["value"] = f"<image>\nThe patient is {50 + index}. Which stripes?"
    (data / "train.json").write_text(json.dumps(samples))
    first = str(runs / "llava-full-1")
    flags = ["--vitask", "True", "--vitask_features", str(feature_store), "--vitask_stage", "2"]
    flags += ["--model_name_or_path", first, "--vitask_connector_path", first]
    command = arguments(tiny_llava, data, tmp_path / "output", *flags)
    ended = launch(1, command, tmp_path / "log")
    assert ended.statuses == [0], ended.text
    assert ended.text.count("5 of 26 samples have a question that no sample of another answer has") == 1
    log = history(tmp_path / "output")
    assert sum(entry["relaxed_negatives"] > 0 for entry in log) >= 2 and all(entry["loss_crt"] > 0 for entry in log)
    assert [entry["relaxed_negatives"] for entry in history(runs / "llava-full-2")] == [0] * 4


def test_the_folder_is_a_stock_checkpoint_and_a_record_beside_it(runs, tsm_directory):
    from vitask_plugin.tsm.model import TSM

    for kind, stage in (("full", 1), ("full", 2), ("lora", 1), ("lora", 2)):
        directory = runs / f"llava-{kind}-{stage}"
        record = json.loads((directory / "vitask.json").read_text())
        assert record["arguments"]["vitask_stage"] == stage and record["ep"] == "cls"
        assert record["tsm"]["hash"] == TSM.load(tsm_directory).hash
        assert record["connector"]["in"] == record["tsm"]["width"]
        assert len(record["tasks"]["vitask_drawn"]) == 4
        assert record["images"]["vitask_drawn"]["width"] == record["images"]["vitask_drawn"]["height"] == [28, 28]
        assert record["images"]["vitask_drawn"]["pixels"] == {}  # labels.json says so: 8 bits
        assert not any("vitask" in name for name in weights(directory))
    config = json.loads((runs / "llava-full-2" / "config.json").read_text())
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_stock_llava_loads_it_and_says_what_ours_says_without_exemplar(kind, runs, tiny_llava, mixed_data):
    from PIL import Image

    from vitask_plugin.llava.loading import load

    base = None if kind == "full" else tiny_llava.base
    ours = load(runs / f"llava-{kind}-2", base)
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    name = f"llava-{kind}"
    tokenizer, stock, processor, _ = load_pretrained_model(
        str(runs / f"llava-{kind}-2"), base and str(base), name, device_map="cpu", device="cpu"
    )
    # Stock LLaVA rounds to float16, which the CPU is slow at; the same rounding on our side, then float32 on both.
    stock = stock.float()
    stock.get_vision_tower().float()
    ours.model.half().float()
    stock_weights = dict(stock.named_parameters())
    for parameter, weight in ours.model.named_parameters():
        if "vitask_connector" not in parameter:
            # A LoRA adapter is merged by stock LLaVA after the rounding.
            assert torch.allclose(weight, stock_weights[parameter], rtol=0, atol=0 if kind == "full" else 1e-3), (
                parameter
            )
    answers = set()
    for sample in json.loads((mixed_data / "train.json").read_text())[6:10]:
        conversation = conv_templates["v1"].copy()
        conversation.append_message("USER", sample["conversations"][0]["value"])
        conversation.append_message("ASSISTANT", None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
        image = process_images([Image.open(mixed_data / "images" / sample["image"])], processor, stock.config)
        common = {"do_sample": False, "max_new_tokens": 8}
        theirs = stock.generate(ids, images=image, attention_mask=torch.ones_like(ids), **common)
        prompts = ours.model.vitask_prompts(ids, torch.ones_like(ids), image)
        found = ours.model.vitask_generate(prompts, **common)
        assert found.tolist() == theirs.tolist()
        answers.add(tuple(found[0].tolist()))
    assert all(len(answer) > 1 for answer in answers)


@pytest.mark.parametrize("kind", ["full", "lora", "stage 2"])
def test_interrupted_and_resumed_is_uninterrupted(kind, runs, tmp_path, tiny_llava, mixed_data, feature_store):
    """A run that lost its end (all after step 2) and is started again ends where the whole one did."""
    vitask = ["--vitask", "True", "--vitask_features", str(feature_store)]
    first = str(runs / "llava-full-1")
    # Two epochs, resumed in the first: the second has an order of its own.
    stage_2 = ["--vitask_stage", "2", "--model_name_or_path", first, "--num_train_epochs", "2"]
    flags = {"full": [], "lora": LORA, "stage 2": stage_2}[kind]
    steps = ["--save_strategy", "steps", "--save_steps", "2"]
    whole = train(tiny_llava, mixed_data, tmp_path / "whole", *vitask, *flags, *steps)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(tiny_llava, mixed_data, resumed, *vitask, *flags, *steps)
    log = history(whole)
    assert [entry["loss"] for entry in history(resumed)] == [entry["loss"] for entry in log]
    expected, found = weights(whole), weights(resumed)
    expected |= load_file(whole / "vitask_connector.safetensors")
    found |= load_file(resumed / "vitask_connector.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_accumulation_does_not_change_the_loss(tmp_path, runs, tiny_llava, mixed_data, feature_store):
    """Batch 8 and batch 2 x accumulation 4 see the same samples in a step in stage 1, so they log the same loss."""
    vitask = ["--vitask", "True", "--vitask_features", str(feature_store)]
    small = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    output = train(tiny_llava, mixed_data, tmp_path / "small", *vitask, *small)
    for ours, reference in zip(history(output), history(runs / "llava-full-1"), strict=True):
        assert ours["loss"] == pytest.approx(reference["loss"], rel=1e-4)
        assert ours["loss_vanilla"] == pytest.approx(reference["loss_vanilla"], rel=1e-4)


def test_bf16_and_gradient_checkpointing(tmp_path, runs, tiny_llava, mixed_data, feature_store):
    """The same LoRA run in bfloat16 with checkpointed layers starts at the same loss, within bfloat16's rounding."""
    flags = ["--vitask", "True", "--vitask_features", str(feature_store), *LORA]
    lighter = ["--bf16", "True", "--gradient_checkpointing", "True"]
    log = history(train(tiny_llava, mixed_data, tmp_path / "bf16", *flags, *lighter))
    reference = history(runs / "llava-lora-1")
    assert log[0]["loss"] == pytest.approx(reference[0]["loss"], rel=5e-3)
    assert len(log) == len(reference) and log[-1]["loss_vanilla"] < log[0]["loss_vanilla"]
