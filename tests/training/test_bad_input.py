"""Each bad input to training ends upstream's `train()` with one sentence that says what, where and what to do."""

import json
import logging
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from runs import LORA, arguments

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.method import objective
from vitask_plugin.method.connector import ExemplarConnector
from vitask_plugin.tsm.features import FeatureStore


@pytest.fixture
def refused(tiny_llava, mixed_data, tmp_path, monkeypatch):
    """Runs the training command in this process; returns the sentence it ended with."""
    from vitask_plugin.llava import compat
    from vitask_plugin.llava.install import wrap

    compat.prepare()
    from llava.train.train import train

    def run(*flags: str, data: Path = mixed_data) -> str:
        output = tmp_path / "output"
        command = arguments(tiny_llava, data, output, "--vitask", "True", *flags)
        monkeypatch.setattr(sys, "argv", ["train.py", *command])
        with pytest.raises(SystemExit) as stopped:
            wrap(train)()
        sentence = str(stopped.value)
        assert sentence.startswith("vitask: error: ") and "\n" not in sentence
        weights = [path for path in output.rglob("*") if path.suffix in (".safetensors", ".bin", ".npy")]
        assert not weights, f"left behind: {weights}"
        return sentence

    return run


@pytest.fixture
def stage_1(tmp_path, feature_store):
    """Writes what stage 2 needs of a stage-1 folder, for a feature width and the hash of its TSM."""
    from vitask_plugin.record import checkpoint, connector_file

    def make(width: int, tsm_hash: str | None = None) -> Path:
        connector = ExemplarConnector("linear", width, 64)
        directory = tmp_path / "stage-1"
        connector_file.save_connector(connector, connector.state_dict(), directory)
        tsm = {"hash": tsm_hash or FeatureStore.open(feature_store).tsm_hash, "width": width}
        flags = VITaskArguments(vitask=True, vitask_features=str(feature_store))
        checkpoint.save_record(directory, flags, connector, tsm, {}, "v1")
        return directory

    return make


def samples_of(data: Path) -> list[dict]:
    return json.loads((data / "train.json").read_text())


@pytest.fixture
def changed_data(tmp_path, mixed_data):
    """A copy of the mixed data whose samples a function changes."""

    def make(change) -> Path:
        directory = tmp_path / "changed"
        shutil.copytree(mixed_data, directory)
        samples = samples_of(directory)
        samples = change(samples) or samples
        (directory / "train.json").write_text(json.dumps(samples))
        return directory

    return make


def test_exemplars_without_a_tsm(refused):
    assert "needs --vitask_tsm DIR or --vitask_features DIR" in refused()


def test_a_negative_weight(refused, feature_store):
    sentence = refused("--vitask_features", str(feature_store), "--vitask_rda_weight", "-1")
    assert "--vitask_rda_weight is -1.0" in sentence


def test_stage_2_without_a_connector(refused, tiny_llava, feature_store):
    sentence = refused("--vitask_features", str(feature_store), "--vitask_stage", "2")
    assert "needs a stage-1 connector" in sentence and str(tiny_llava.base) in sentence
    assert "--vitask_connector_path" in sentence


def test_a_connector_of_another_feature_width(refused, stage_1, feature_store):
    width = FeatureStore.open(feature_store).width
    directory = stage_1(width + 1)
    flags = ["--vitask_stage", "2", "--vitask_connector_path", str(directory)]
    sentence = refused("--vitask_features", str(feature_store), *flags)
    assert f"maps {width + 1} to 64" in sentence and f"are {width} wide" in sentence


def test_a_connector_trained_with_another_tsm(refused, stage_1, feature_store):
    store = FeatureStore.open(feature_store)
    directory = stage_1(store.width, "f" * 64)
    flags = ["--vitask_stage", "2", "--vitask_connector_path", str(directory)]
    sentence = refused("--vitask_features", str(feature_store), *flags)
    assert "f" * 12 in sentence and store.tsm_hash[:12] in sentence


def test_a_truncated_connector(refused, stage_1, feature_store):
    directory = stage_1(FeatureStore.open(feature_store).width)
    path = directory / "vitask_connector.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    flags = ["--vitask_stage", "2", "--vitask_connector_path", str(directory)]
    sentence = refused("--vitask_features", str(feature_store), *flags)
    assert str(path) in sentence and "truncated" in sentence


def test_lora_stage_2_from_a_truncated_adapter(refused, stage_1, feature_store):
    directory = stage_1(FeatureStore.open(feature_store).width)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    flags = [*LORA, "--vitask_stage", "2", "--vitask_connector_path", str(directory)]
    sentence = refused("--vitask_features", str(feature_store), *flags)
    assert str(directory) in sentence and "adapter" in sentence


def test_features_of_another_tsm(refused, feature_store, tsm_directory, tmp_path):
    from vitask_plugin.tsm.model import TSM

    other = TSM.load(tsm_directory)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save(tmp_path / "other")
    sentence = refused("--vitask_features", str(feature_store), "--vitask_tsm", str(tmp_path / "other"))
    assert TSM.load(tmp_path / "other").hash[:12] in sentence
    assert TSM.load(tsm_directory).hash[:12] in sentence


def test_features_of_other_images(refused, feature_store, changed_data):
    def rename(samples):
        samples[-1]["image"] = "train/new.png"

    data = changed_data(rename)
    shutil.copy(next((data / "images" / "train").iterdir()), data / "images" / "train" / "new.png")
    sentence = refused("--vitask_features", str(feature_store), data=data)
    assert "train/new.png" in sentence and "vitask tsm extract" in sentence


def test_an_image_that_changed_since_extraction(refused, feature_store, changed_data):
    from PIL import Image

    data = changed_data(lambda samples: None)
    changed = samples_of(data)[6]["image"]
    Image.new("RGB", (28, 28), "red").save(data / "images" / changed)
    sentence = refused("--vitask_features", str(feature_store), data=data)
    assert changed in sentence and "vitask tsm extract" in sentence


class Broken(torch.utils.data.Dataset):
    """A data set that only the worker finds fault with."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise VITaskError("image 'a.png' is gone; copy it again")


def test_an_error_of_a_worker_is_cut_to_its_sentence():
    from vitask_plugin.training.running import stop

    with pytest.raises(VITaskError, match="Traceback") as caught:
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1)))
    with pytest.raises(SystemExit) as stopped:
        stop(caught.value)
    assert stopped.value.code == "vitask: error: image 'a.png' is gone; copy it again"


def test_features_of_the_other_kind(refused, feature_stores):
    sentence = refused("--vitask_features", str(feature_stores["cls"]), "--vitask_ep", "all")
    assert "--tokens all" in sentence


def test_a_sample_without_its_image(refused, feature_store, changed_data):
    def remove(samples):
        del samples[6]["image"]

    sentence = refused("--vitask_features", str(feature_store), data=changed_data(remove))
    assert "sample 6" in sentence and "image" in sentence


def test_an_image_path_that_leaves_the_folder(refused, feature_store, changed_data):
    def leave(samples):
        samples[6]["image"] = "../../secret.png"

    sentence = refused("--vitask_features", str(feature_store), data=changed_data(leave))
    assert "../../secret.png" in sentence and "leaves the image folder" in sentence


@pytest.mark.parametrize("name", [None, "odd one"])
def test_a_sample_is_named_by_its_place_where_it_has_no_id(name, refused, feature_store, changed_data):
    """Whatever is wrong with its image: a path that leaves the folder, no file, a broken file met in the loader."""
    general = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]}
    if name:
        general["id"] = name
    where = f"sample {name!r}" if name else "sample 30"
    data = changed_data(lambda samples: [*samples, {**general, "image": "../x.png"}])
    path, flags = data / "train.json", ["--vitask_features", str(feature_store)]
    assert f"{where} of {str(path)!r}: image path '../x.png' leaves" in refused(*flags, data=data)
    samples = samples_of(data)
    samples[-1]["image"] = "x.png"
    path.write_text(json.dumps(samples))
    assert f"{where} of {str(path)!r}: image 'x.png' is not in" in refused(*flags, data=data)
    (data / "images" / "x.png").write_bytes(b"<html>")
    for which in ("all", "none"):
        assert f"{where}: image " in refused(*flags, "--vitask_check_images", which, data=data)


def test_a_model_that_lacks_weights_is_not_trained_from(refused, tiny_checkpoint, feature_store, tmp_path):
    """transformers would draw them at random, with a warning."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "llava-short"
    shutil.copytree(tiny_checkpoint, copy)
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    sentence = refused("--vitask_features", str(feature_store), "--model_name_or_path", str(copy))
    assert "lack 1 tensors, 'model.layers.1.mlp.up_proj.weight' among them" in sentence and str(copy) in sentence


def test_an_adapter_is_no_model_to_start_from(refused, stage_1, feature_store):
    directory = stage_1(FeatureStore.open(feature_store).width)
    for name in ("config.json", "adapter_config.json"):
        (directory / name).write_text("{}")
    sentence = refused("--vitask_features", str(feature_store), "--model_name_or_path", str(directory))
    assert "is the output of a LoRA run" in sentence and "--vitask_connector_path" in sentence


DAMAGED_RECORDS = {
    "no arguments": (lambda record: record.pop("arguments"), "/arguments is missing; copy it again"),
    "no tasks": (lambda record: record.update(tasks=None), "/tasks is None; expected an object"),
    "half a TSM": (lambda record: record["tsm"].pop("hash"), "/tsm/hash is missing"),
    "a text as a width": (
        lambda record: record["connector"].update(out="64"),
        "/connector/out is '64'; expected a whole",
    ),
    "two exemplars": (lambda record: record.update(ep="none"), "/ep is 'none' and /arguments/vitask_ep is 'cls'"),
    "another connector": (lambda record: record["connector"].update(sha256="0" * 64), "recorded 000000000000"),
    "a later flag": (lambda record: record["arguments"].update(vitask_new=1), "has the unknown flag --vitask_new"),
}


@pytest.mark.parametrize("name", DAMAGED_RECORDS)
def test_a_damaged_record(name, refused, stage_1, feature_store):
    directory = stage_1(FeatureStore.open(feature_store).width)
    change, words = DAMAGED_RECORDS[name]
    record = json.loads((directory / "vitask.json").read_text())
    change(record)
    (directory / "vitask.json").write_text(json.dumps(record))
    flags = ["--vitask_stage", "2", "--vitask_connector_path", str(directory)]
    sentence = refused("--vitask_features", str(feature_store), *flags)
    assert words in sentence and str(directory / "vitask.json") in sentence


def test_a_connector_of_a_run_that_diverged(refused, stage_1, feature_store):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    directory = stage_1(FeatureStore.open(feature_store).width)
    path = directory / "vitask_connector.safetensors"
    with safe_open(path, "pt") as file:
        shape = file.metadata()
    save_file({name: weight * float("nan") for name, weight in load_file(path).items()}, path, shape)
    flags = ["--vitask_stage", "2", "--vitask_connector_path", str(directory)]
    assert "infinite or none" in refused("--vitask_features", str(feature_store), *flags)


def test_one_class_has_no_negative(refused, stage_1, feature_store, changed_data):
    directory = stage_1(FeatureStore.open(feature_store).width)
    data = changed_data(lambda samples: [sample for sample in samples if sample.get("vitask", {}).get("label") == 0])
    flags = ["--vitask_stage", "2", "--vitask_connector_path", str(directory)]
    sentence = refused("--vitask_features", str(feature_store), *flags, data=data)
    assert "no negative image" in sentence


def test_a_json_that_is_not_llavas(refused, feature_store, changed_data):
    data = changed_data(lambda samples: [{"question": "What?", "answer": "That."}])
    assert "LLaVA's JSON" in refused("--vitask_features", str(feature_store), data=data)


def test_a_json_without_any_task(refused, feature_store, changed_data):
    data = changed_data(lambda samples: [sample for sample in samples if "vitask" not in sample])
    assert "no sample with a 'vitask' block" in refused("--vitask_features", str(feature_store), data=data)


def test_a_truncated_checkpoint_at_inference(tiny_checkpoint, tmp_path):
    from vitask_plugin.errors import VITaskError
    from vitask_plugin.llava.loading import load

    copy = tmp_path / "llava-truncated"
    shutil.copytree(tiny_checkpoint, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    before = sha256_file(weights)
    with pytest.raises(VITaskError, match="cannot be read"):
        load(copy)
    assert sha256_file(weights) == before
    with pytest.raises(VITaskError, match=r"no config\.json"):
        load(tmp_path)


def test_a_configuration_of_fewer_layers_than_weights(tiny_checkpoint, refused, feature_store, tmp_path):
    from vitask_plugin.errors import VITaskError
    from vitask_plugin.llava.loading import load

    copy = tmp_path / "llava-short"
    shutil.copytree(tiny_checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    sentence = r"hold 9 tensors of layers that config.json does not have, 'model.layers.1.*copy both again"
    with pytest.raises(VITaskError, match=sentence):
        load(copy)
    start = refused("--vitask_features", str(feature_store), "--model_name_or_path", str(copy))
    assert re.search(sentence, start)


def test_a_tokenizer_of_more_words_than_embeddings(tiny_checkpoint, tmp_path):
    from transformers import AutoTokenizer

    from vitask_plugin.errors import VITaskError
    from vitask_plugin.llava.loading import load

    copy = tmp_path / "llava-words"
    shutil.copytree(tiny_checkpoint, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy, use_fast=False)
    rows = json.loads((copy / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"word{number}" for number in range(rows)])
    tokenizer.save_pretrained(copy)
    with pytest.raises(VITaskError, match=rf"has \d+ words and the model embeddings of {rows}; it is another"):
        load(copy)


def test_upstream_is_itself_again_after_a_vitask_run(refused, feature_store):
    from llava.train import train

    before = dict(vars(train))
    refused("--vitask_features", str(feature_store), "--vitask_ep", "all")
    changed = {name for name, value in vars(train).items() if before.get(name) is not value}
    assert not changed & {"ModelArguments", "LlavaLlamaForCausalLM", "LazySupervisedDataset", "LLaVATrainer"}


def test_answers_cut_off_by_the_maximum_length(refused, feature_store):
    sentence = refused("--vitask_features", str(feature_store), "--model_max_length", "40")
    assert "no answer token left" in sentence and "--model_max_length 40" in sentence


def test_a_base_model_that_is_truncated(refused, tiny_llava, feature_store, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(tiny_llava.base, copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    sentence = refused("--vitask_features", str(feature_store), "--model_name_or_path", str(copy))
    assert str(copy) in sentence and "truncated" in sentence


def test_stage_2_with_another_kind_of_exemplar(refused, stage_1, feature_stores):
    store = FeatureStore.open(feature_stores["all"])
    directory = stage_1(store.width)
    flags = ["--vitask_stage", "2", "--vitask_connector_path", str(directory), "--vitask_ep", "all"]
    sentence = refused("--vitask_features", str(feature_stores["all"]), *flags)
    assert "--vitask_ep cls" in sentence and "--vitask_ep all" in sentence


def test_a_lora_stage_1_without_lora_in_stage_2(refused, stage_1, feature_store):
    directory = stage_1(FeatureStore.open(feature_store).width)
    (directory / "adapter_config.json").write_text("{}")
    flags = ["--vitask_stage", "2", "--vitask_connector_path", str(directory)]
    sentence = refused("--vitask_features", str(feature_store), *flags)
    assert "--lora_enable True" in sentence and str(directory) in sentence


def test_a_full_stage_1_and_a_stage_2_from_the_base_model(refused, stage_1, tiny_llava, feature_store):
    directory = stage_1(FeatureStore.open(feature_store).width)
    flags = ["--vitask_stage", "2", "--vitask_connector_path", str(directory)]
    sentence = refused("--vitask_features", str(feature_store), *flags)
    assert str(directory) in sentence and str(tiny_llava.base) in sentence


def test_without_a_vision_tower(refused, feature_store, monkeypatch):
    from vitask_plugin.errors import VITaskError
    from vitask_plugin.llava import compat
    from vitask_plugin.llava.install import install

    compat.prepare()
    from llava.train import train

    with pytest.raises(VITaskError, match="needs --vision_tower"):
        install(dict(vars(train)), ["--vitask", "True", "--vitask_features", str(feature_store)])


def test_a_checkpoint_of_another_stage_is_not_resumed(refused, stage_1, feature_store, tmp_path):
    directory = stage_1(FeatureStore.open(feature_store).width)
    checkpoint = tmp_path / "output" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    flags = ["--vitask_features", str(feature_store)]
    assert "a run without --vitask" in refused(*flags)
    shutil.copy(directory / "vitask.json", checkpoint)
    record = json.loads((checkpoint / "vitask.json").read_text())
    record["arguments"]["vitask_stage"] = 2
    (checkpoint / "vitask.json").write_text(json.dumps(record))
    sentence = refused(*flags)
    assert "stage 2 with --vitask_ep cls" in sentence and "checkpoint-2" in sentence


DAMAGED = {
    "half a torch file": ("pytorch_model.bin", b"PK\x03\x04 half"),
    "no configuration": ("config.json", b"{"),
    "no tokenizer": ("tokenizer_config.json", b"{"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_at_inference(name, tiny_checkpoint, tmp_path):
    from vitask_plugin.errors import VITaskError
    from vitask_plugin.llava.loading import load

    copy = tmp_path / "llava-damaged"
    shutil.copytree(tiny_checkpoint, copy)
    file, content = DAMAGED[name]
    if file == "pytorch_model.bin":
        (copy / "model.safetensors").unlink()
    (copy / file).write_bytes(content)
    with pytest.raises(VITaskError, match="cannot be read"):
        load(copy)


def test_a_checkpoint_that_lacks_weights(tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    from vitask_plugin.errors import VITaskError
    from vitask_plugin.llava.loading import load

    copy = tmp_path / "llava-short"
    shutil.copytree(tiny_checkpoint, copy)
    weights = load_file(copy / "model.safetensors")
    del weights["model.mm_projector.0.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(VITaskError, match=r"lack 1 tensors, 'model\.mm_projector\.0\.weight'"):
        load(copy)


def test_a_step_that_does_not_fit_ends_with_the_sentence(refused, feature_store, monkeypatch):
    """The allocator's own error, raised in the middle of a step."""
    monkeypatch.setattr(objective, "total", lambda *_, **__: torch.empty(2**50))
    sentence = refused("--vitask_features", str(feature_store))
    assert "out of memory on cpu in a step of 8 samples" in sentence
    assert "--per_device_train_batch_size 4 with" in sentence


def test_another_error_stays_what_it_is(refused, feature_store, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("not about memory")

    monkeypatch.setattr(objective, "total", broken)
    with pytest.raises(ZeroDivisionError):
        refused("--vitask_features", str(feature_store))


def test_flex_attention_is_refused_where_it_has_no_backward(refused, feature_store):
    flags = ["--vitask_features", str(feature_store), "--vitask_attention", "flex_attention"]
    assert "--vitask_attention flex_attention has no backward pass on cpu" in refused(*flags)
    assert VITaskArguments().vitask_attention == "sdpa"


@pytest.mark.parametrize(
    ("turn", "words", "found"),
    [
        (1, "{} ### Human: more", "holds '###'"),  # separates turns in --version v0 alone
        (1, "{}<extra>", "holds '<extra>'"),  # of this tokenizer alone
        (0, "{} Assistant: yes", "holds 'Assistant:'"),
        (1, "", "is empty"),
    ],
)
def test_words_that_the_template_takes_for_its_own(refused, changed_data, monkeypatch, turn, words, found):
    from llava import conversation
    from llava.train import train as upstream

    make = upstream.make_supervised_data_module

    def with_a_token_of_its_own(tokenizer, **rest):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
        return make(tokenizer=tokenizer, **rest)

    monkeypatch.setattr(upstream, "make_supervised_data_module", with_a_token_of_its_own)
    monkeypatch.setitem(conversation.conv_templates, "v1", conversation.conv_templates["v0"])

    def change(samples):
        sample = next(sample for sample in samples if "vitask" in sample)
        sample["id"] = "odd one"
        sample["conversations"][turn]["value"] = words.format(sample["conversations"][turn]["value"])

    sentence = refused("--vitask_ep", "learned", data=changed_data(change))
    assert "(id 'odd one'): turn " + str(turn) in sentence and found in sentence
    assert "--model_max_length" not in sentence


def test_general_samples_that_upstream_cuts_in_pieces_are_counted(monkeypatch, caplog):
    from llava import conversation

    from vitask_plugin.data.reserved import check_turns
    from vitask_plugin.llava.conversations import reserved_strings

    class Tokenizer:
        all_special_tokens = ("<s>", "</s>")

    monkeypatch.setattr(conversation, "default_conversation", conversation.conv_templates["v1"])
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Text </s> struck through."}]
    samples = [{"id": number, "conversations": turns} for number in range(3)]
    with caplog.at_level(logging.WARNING):
        fine = {"conversations": [turns[0], {"from": "gpt", "value": "# ### fine"}]}
        check_turns([*samples, fine], reserved_strings(Tokenizer()), "x")
    assert "3 of 4 samples of 'x'" in caplog.text and "sample 0 (id 0): turn 1, an answer, holds '</s>'" in caplog.text
