"""A mixed data set (task samples, general image and text-only samples, several turns), a TSM, and its features."""

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mixture import several_turns

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.contents import survey
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.tsm.features import FeatureStore

MODEL = "test_resnet.r160_in1k"


@pytest.fixture(scope="session")
def mixed_data(tmp_path_factory: pytest.TempPathFactory, drawn_data: Path) -> Path:
    """`train.json` + `images/`: 2 samples of several turns, 2 general images, 2 text-only, 24 drawn. Read only."""
    directory = tmp_path_factory.mktemp("mixed") / "data"
    shutil.copytree(drawn_data, directory)
    samples = json.loads((directory / "train.json").read_text())
    general = [
        {
            "id": f"general-{number}",
            "image": samples[number]["image"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": "A texture with stripes."},
            ],
        }
        for number in range(2)
    ]
    general[1]["conversations"] = [
        {"from": "human", "value": "Hello."},
        {"from": "gpt", "value": "An answer before the image."},
        *general[1]["conversations"],
    ]
    text = [
        {
            "id": f"text-{number}",
            "conversations": [
                {"from": "human", "value": "Analyze the weather."},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, answer in enumerate(("It is mild.", "It is no image and has stripes."))
    ]
    mixed = [*several_turns(samples), *general, *text, *samples]
    (directory / "train.json").write_text(json.dumps(mixed))
    return directory


@pytest.fixture(scope="session")
def tsm_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TSM with random weights: what the features mean does not matter here, only where they go. Read only."""
    import torch

    from vitask_plugin.data.instructions import DRAWN
    from vitask_plugin.tsm.backbone import build_timm, pixel_statistics
    from vitask_plugin.tsm.model import TSM

    torch.manual_seed(0)
    network = build_timm(MODEL, len(DRAWN.choices), {})
    mean, std = pixel_statistics(network)
    tasks = {DRAWN.task: {"choices": list(DRAWN.choices), "multi_label": False}}
    record = {"source": {"timm": MODEL}, "image_size": 32, "mean": mean, "std": std, "tasks": tasks}
    directory = tmp_path_factory.mktemp("tsm") / "tsm"
    TSM(network, record).save(directory)
    return directory


@pytest.fixture(scope="session")
def feature_stores(tmp_path_factory: pytest.TempPathFactory, mixed_data: Path, tsm_directory: Path) -> dict[str, Path]:
    """Feature stores of the mixed data: `cls` (one pooled token) and `all` (patch features)."""
    from vitask_plugin.tsm.features import extract

    stores = {}
    for tokens in ("cls", "all"):
        stores[tokens] = tmp_path_factory.mktemp("features") / tokens
        extract(tsm_directory, [mixed_data / "train.json"], mixed_data / "images", stores[tokens], tokens=tokens)
    return stores


@pytest.fixture(scope="session")
def feature_store(feature_stores: dict[str, Path]) -> Path:
    return feature_stores["cls"]


@pytest.fixture
def build(tiny_llava, mixed_data, feature_stores, tsm_directory):
    """Makes upstream's dataset and collator, ours on top, for a stage; returns (dataset, collator)."""
    import transformers

    from vitask_plugin.llava import compat

    compat.prepare()
    from llava import conversation

    from vitask_plugin.llava.batch import VITaskCollator, VITaskDataset
    from vitask_plugin.tsm.model import TSM

    conversation.default_conversation = conversation.conv_templates["v1"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llava.base, use_fast=False, model_max_length=512)
    tokenizer.pad_token = tokenizer.unk_token
    processor = transformers.CLIPImageProcessor.from_pretrained(tiny_llava.tower)

    def make(data: Path = mixed_data / "train.json", **flags):
        tokens = "all" if flags.get("vitask_ep") in ("all", "replace") else "cls"
        paths = {"vitask_features": str(feature_stores[tokens]), "vitask_tsm": str(tsm_directory)}
        vitask = VITaskArguments(vitask=True, **paths, **flags)
        folder = SimpleNamespace(
            image_folder=str(mixed_data / "images"),
            image_processor=processor,
            image_aspect_ratio="square",
            is_multimodal=True,
            mm_use_im_start_end=False,
        )
        dataset = VITaskDataset(str(data), tokenizer, folder, vitask=vitask)
        contents, features = survey(dataset.image_folder, dataset.images(), dataset.task_images()), ()
        if vitask.uses_tsm:
            features = (FeatureStore.open(feature_stores[tokens]), TSM.load(tsm_directory).record["tasks"])
        tower = transformers.CLIPVisionConfig.from_pretrained(tiny_llava.tower)
        image_tokens = (tower.image_size // tower.patch_size) ** 2
        exemplars = Exemplars(vitask, dataset, contents, *features)
        return dataset, VITaskCollator(dataset, exemplars, vitask, image_tokens=image_tokens)

    return make


@pytest.fixture
def instances_of():
    """The instances of hand-picked samples, in their order, with the negatives that a step of them would have."""

    def make(dataset, indices):
        from vitask_plugin.method.sampler import ContrastiveSampler

        if dataset.negatives is None:
            return [dataset[index] for index in indices]
        sampler = ContrastiveSampler(dataset.negatives, len(indices), seed=0)
        return [dataset[item] for item in sampler.contrast(indices, random.Random(0))]

    return make
