"""`vitask connector fit`: another TSM for a tuned VLM. What is learnt, what is left alone, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import reference
import torch
from safetensors.torch import load_file

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.cli import main
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.method.connector import ExemplarConnector, LearnedPrefix
from vitask_plugin.tsm.model import TSM

WIDTH = 64  # of the tiny LLaVA
SEED = 42


def tree_hash(directory: Path) -> dict[str, str]:
    return {str(path): sha256_file(path) for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def make_tuned(tmp_path_factory, tiny_checkpoint, tsm_directory):
    """Writes a checkpoint as training leaves it: the VLM, an exemplar connector (or none) and the record."""
    from vitask_plugin.record import checkpoint, connector_file

    tsm = TSM.load(tsm_directory)

    def make(ep: str = "cls", seed: int = 1) -> Path:
        directory = tmp_path_factory.mktemp("tuned") / "llava-tuned"
        shutil.copytree(tiny_checkpoint, directory)
        width = tsm.record["feature_width" if ep == "cls" else "patch_width"]
        torch.manual_seed(seed)
        connector = {"learned": LearnedPrefix(WIDTH), "text": None, "none": None}.get(
            ep, ExemplarConnector("linear", width, WIDTH)
        )
        if connector is not None:
            connector_file.save_connector(connector, connector.state_dict(), directory)
        flags = VITaskArguments(vitask=True, vitask_ep=ep, vitask_tsm="tsm", vitask_connector="linear")
        identity = None if ep in ("learned", "none") else {"hash": tsm.hash, "width": width}
        checkpoint.save_record(directory, flags, connector, identity, tsm.record["tasks"], "v1")
        return directory

    return make


@pytest.fixture(scope="module")
def tuned(make_tuned) -> Path:
    return make_tuned()


@pytest.fixture(scope="module")
def new_tsm(tmp_path_factory, tsm_directory) -> Path:
    """A TSM of another architecture, and of another width."""
    from vitask_plugin.tsm.backbone import build_timm, timm_options

    torch.manual_seed(5)
    options = timm_options("test_vit", len(DRAWN.choices), 32)
    record = {
        "source": {"timm": "test_vit", "options": options},
        "image_size": 32,
        **{"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "tasks": TSM.load(tsm_directory).record["tasks"],
    }
    directory = tmp_path_factory.mktemp("new") / "tsm"
    tsm = TSM(build_timm("test_vit", len(DRAWN.choices), options), record)
    assert tsm.record["feature_width"] != TSM.load(tsm_directory).record["feature_width"]
    tsm.save(directory)
    return directory


def command(checkpoint: Path, tsm: Path, data: Path, output: Path, *words: str) -> list[str]:
    return [
        *("connector", "fit", "--checkpoint", str(checkpoint), "--tsm", str(tsm)),
        *("--data", str(data / "train.json"), "--image-folder", str(data / "images"), "--out", str(output)),
        *("--device", "cpu", "--batch-size", "8", *words),
    ]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tuned, new_tsm, mixed_data):
    """One fit by the command: its folder, the model it held in memory, and what was on disk before."""
    from vitask_plugin.llava import loading

    output, held, load = tmp_path_factory.mktemp("fit") / "fitted", [], loading.load
    before = tree_hash(tuned) | tree_hash(new_tsm)

    def seen(*args, **kwargs):
        held.append(load(*args, **kwargs))
        return held[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", seen)
        words = ["--steps", "16", "--learning-rate", "1e-2"]
        assert main(command(tuned, new_tsm, mixed_data, output, *words)) == 0
    return SimpleNamespace(directory=output, model=held[0].model, before=before)


def test_it_writes_the_connector_and_whose_it_is(fitted, tuned, new_tsm, mixed_data, tsm_directory):
    assert sorted(path.name for path in fitted.directory.iterdir()) == ["vitask.json", "vitask_connector.safetensors"]
    record = json.loads((fitted.directory / "vitask.json").read_text())
    tsm = TSM.load(new_tsm)
    assert record["ep"] == "cls" and record["version"] == "v1"
    assert record["tsm"] == {"hash": tsm.hash, "width": tsm.record["feature_width"]}
    shape = {"kind": "mlp2x_gelu", "in": tsm.record["feature_width"], "out": WIDTH}
    assert record["connector"] == shape | {"sha256": record["connector"]["sha256"]}
    about = record["fitted"]
    assert about["checkpoint"] == str(tuned) and about["tsm"] == TSM.load(tsm_directory).hash
    assert about["samples"] == len(json.loads((mixed_data / "train.json").read_text())) and about["steps"] == 16
    assert 0 <= about["response_accuracy_ep"] <= 1 and about["loss_ep"] > 0


def test_the_vlm_is_bit_for_bit_what_it_was_on_disk_and_in_memory(fitted, tuned, new_tsm):
    from vitask_plugin.llava.loading import load

    assert tree_hash(tuned) | tree_hash(new_tsm) == fitted.before
    expected = dict(load(tuned).model.named_parameters())
    same = 0
    for name, weight in fitted.model.named_parameters():
        if "vitask_connector" in name:
            assert weight.requires_grad, name
        else:
            assert torch.equal(weight, expected[name]) and not weight.requires_grad, name
            same += 1
    assert same == sum("vitask_connector" not in name for name in expected) > 30


def test_it_is_evaluated_as_the_checkpoint_and_this_connector(fitted, tuned, new_tsm, tsm_directory):
    from vitask_plugin.llava.loading import load
    from vitask_plugin.record.swap import check_tsm

    own, refit = load(tuned), load(tuned, connector=fitted.directory)
    weights = load_file(fitted.directory / "vitask_connector.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in refit.model.vitask_connector.named_parameters())
    assert own.model.vitask_connector.kind == "linear" and refit.model.vitask_connector.kind == "mlp2x_gelu"
    assert refit.record["tasks"] == own.record["tasks"] and "fitted" not in own.record
    old, new = TSM.load(tsm_directory), TSM.load(new_tsm)
    check_tsm(refit.record, new)
    check_tsm(own.record, old)
    for record, tsm in ((own.record, new), (refit.record, old)):
        with pytest.raises(VITaskError, match=str(tsm.record["feature_width"])):
            check_tsm(record, tsm)


def test_it_learns_by_ep_alone(tuned, new_tsm, mixed_data, tmp_path):
    """One step on two samples: AdamW's first step goes by the learning rate against the sign of L_EP's gradient."""
    from vitask_plugin.llava.loading import load, load_connector

    data = tmp_path / "data"
    shutil.copytree(mixed_data, data)
    samples = json.loads((mixed_data / "train.json").read_text())[6:8]
    (data / "train.json").write_text(json.dumps(samples))
    output, rate = tmp_path / "fitted", 1e-4
    assert main(command(tuned, new_tsm, data, output, "--learning-rate", str(rate), "--steps", "1")) == 0

    tsm, loaded = TSM.load(new_tsm), load(tuned)
    torch.manual_seed(SEED)
    start = ExemplarConnector("mlp2x_gelu", tsm.record["feature_width"], WIDTH)
    total = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        prefix, text, labels = parts(loaded, sample, data)
        exemplar = start(feature(tsm, data / "images" / sample["image"]))
        logits, tokens = reference.branch_logits(loaded.model, [prefix, exemplar, text], labels)
        total = total + sum(reference.negative_log_likelihood(logits, torch.tensor(tokens)))
    total.backward()
    found, compared = load_connector(output).state_dict(), 0
    for name, weight in start.named_parameters():
        clear = weight.grad.abs() > 1e-3 * weight.grad.abs().max()
        moved = found[name] - weight.detach()
        torch.testing.assert_close(moved[clear], -rate * weight.grad[clear].sign(), rtol=0, atol=0.02 * rate)
        compared += int(clear.sum())
    assert compared > 1000


def parts(loaded, sample, data):
    """(prefix, text, labels) of a sample, from the words of the conversation template v1 and upstream's own pieces."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    question, answer = (turn["value"] for turn in sample["conversations"])
    ids = tokenizer_image_token(f"{system} USER: {question} ASSISTANT: {answer}</s>", loaded.tokenizer)
    asked = tokenizer_image_token(f"{system} USER: {question} ASSISTANT:", loaded.tokenizer)
    assert ids[: len(asked)] == asked
    image = ids.index(-200)
    model, embed = loaded.model, loaded.model.get_model().embed_tokens
    pixels = Image.open(data / "images" / sample["image"]).convert("RGB")
    seen = model.encode_images(process_images([pixels], loaded.image_processor, model.config))[0]
    labels = torch.tensor([-100] * (len(asked) - image - 1) + ids[len(asked) :])
    return (
        torch.cat([embed(torch.tensor(ids[:image])), seen]).detach(),
        embed(torch.tensor(ids[image + 1 :])).detach(),
        labels,
    )


def feature(tsm: TSM, path: Path) -> torch.Tensor:
    from PIL import Image

    return tsm(tsm.preprocess(Image.open(path))[None]).pooled


def test_interrupted_it_leaves_what_was_there(tuned, new_tsm, mixed_data, tmp_path, monkeypatch, fitted):
    from vitask_plugin.llava.trainer import VITaskTrainer

    output = tmp_path / "fitted"
    shutil.copytree(fitted.directory, output)
    before, steps, training_step = tree_hash(output), [], VITaskTrainer.training_step

    def interrupted(*args, **kwargs):
        steps.append(len(steps))
        if len(steps) == 3:
            raise KeyboardInterrupt
        return training_step(*args, **kwargs)

    monkeypatch.setattr(VITaskTrainer, "training_step", interrupted)
    assert main(command(tuned, new_tsm, mixed_data, output)) == 130
    assert steps == [0, 1, 2] and tree_hash(output) == before and list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("ep", ["none", "learned", "text"])
def test_a_checkpoint_that_never_saw_features_is_refused(ep, make_tuned, new_tsm, mixed_data, tmp_path, capsys):
    assert main(command(make_tuned(ep), new_tsm, mixed_data, tmp_path / "fitted")) == 1
    sentence = capsys.readouterr().err
    assert f"--vitask_ep {ep}" in sentence and "cls, all or replace" in sentence
    assert not any(tmp_path.iterdir())


def test_a_plain_checkpoint_and_other_labels_and_a_foreign_folder_are_refused(
    tiny_checkpoint, tuned, new_tsm, mixed_data, tmp_path, capsys
):
    output = tmp_path / "fitted"
    assert main(command(tiny_checkpoint, new_tsm, mixed_data, output)) == 1
    assert "no vitask.json" in capsys.readouterr().err
    data = tmp_path / "data"
    shutil.copytree(mixed_data, data)
    samples = json.loads((data / "train.json").read_text())
    for sample in samples:
        if "vitask" in sample:
            block = sample["vitask"]
            block |= {"choices": block["choices"][::-1], "label": len(block["choices"]) - 1 - block["label"]}
    (data / "train.json").write_text(json.dumps(samples))
    assert main(command(tuned, new_tsm, data, output)) == 1
    sentence = capsys.readouterr().err
    assert "has the labels ['falling stripes'" in sentence and "was trained on ['horizontal stripes'" in sentence
    assert not output.exists()
    before = tree_hash(tuned)
    assert main(command(tuned, new_tsm, mixed_data, tuned)) == 1
    assert "not an earlier output of this command" in capsys.readouterr().err and tree_hash(tuned) == before
    assert main(command(tuned, new_tsm, mixed_data, output, "--batch-size", "0")) == 1
    assert "--batch-size is 0; it must be at least 1" in capsys.readouterr().err


def test_a_connector_of_another_checkpoint_is_refused(fitted, tuned, make_tuned, tsm_directory):
    from vitask_plugin.llava.loading import load

    other = make_tuned(seed=2)
    with pytest.raises(VITaskError) as error:
        load(other, connector=fitted.directory)
    assert str(tuned) in str(error.value) and str(other) in str(error.value)
    with pytest.raises(VITaskError, match="holds no connector that `vitask connector align` or `fit` wrote"):
        load(tuned, connector=other)
    with pytest.raises(VITaskError, match="holds no connector that `vitask connector align` or `fit` wrote"):
        load(tuned, connector=tsm_directory)


def test_images_unlike_those_of_training_are_refused(make_tuned, new_tsm, mixed_data, tmp_path, capsys):
    """They are 28x28, and had 8 bits. The checkpoint or the TSM was trained on something else."""
    tuned, tsm = make_tuned(), shutil.copytree(new_tsm, tmp_path / "tsm")
    large = {"width": [224, 224], "height": [224, 224], "images": 9}
    deep = {"width": [28, 28], "height": [28, 28], "images": 9, "pixels": {"window": [0, 4095]}}
    words = command(tuned, tsm, mixed_data, tmp_path / "fitted", "--steps", "1")
    for who, path in (("checkpoint", tuned / "vitask.json"), ("TSM", tsm / "tsm.json")):
        before = path.read_text()
        for entry, trained, used in ((large, "224x224 images", "28x28"), (deep, "0 to 4095", "through no window")):
            path.write_text(json.dumps({**json.loads(before), "images": {DRAWN.task: entry}}))
            assert main(words) == 1
            said = capsys.readouterr().err.strip().splitlines()[-1]
            assert f"error: {who} " in said and trained in said and f"are {used}" in said and "--any-image-size" in said
            assert not (tmp_path / "fitted").exists()
        assert main([*words, "--any-image-size"]) == 0
        shutil.rmtree(tmp_path / "fitted")
        path.write_text(before)


def test_out_of_memory_names_this_commands_own_knobs(tuned, new_tsm, mixed_data, tmp_path, monkeypatch, capsys):
    from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(VITaskLlavaLlamaForCausalLM, "vitask_states", full)
    assert main(command(tuned, new_tsm, mixed_data, tmp_path / "fitted")) == 1
    sentence = capsys.readouterr().err.partition("vitask: error: ")[2].splitlines()[0]
    assert "--batch-size 8" in sentence and "--gradient-checkpointing" in sentence and "--per_device" not in sentence
