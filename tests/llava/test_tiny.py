"""The tiny LLaVA and the drawn data: upstream reads the one, medmnist the other, and both are made the same again."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vitask_plugin.data.drawn import DRAWN_NOISE, draw_dataset, task_texts
from vitask_plugin.data.instructions import DRAWN, instruction, response
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.llava.tiny import main, make_tiny_checkpoint, make_tiny_llava

QUESTION = instruction(DRAWN.modality, DRAWN.choices)


@pytest.fixture(scope="module")
def tokenizer(tiny_llava):
    """As upstream's `train()` loads it for `--version v1`."""
    import transformers

    loaded = transformers.AutoTokenizer.from_pretrained(
        tiny_llava.base, model_max_length=512, padding_side="right", use_fast=False
    )
    loaded.pad_token = loaded.unk_token
    return loaded


@pytest.fixture(scope="module")
def upstream():
    """Upstream's training module with the v1 conversation, as `--version v1` sets it."""
    from vitask_plugin.llava import compat

    compat.prepare()
    from llava import conversation
    from llava.train import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversation, "default_conversation", conversation.conv_templates["v1"])
        yield train


def turns(*values: str) -> list[list[dict[str, str]]]:
    return [[{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]]


@pytest.mark.parametrize("resaved", [False, True], ids=["as made", "saved again"])
@pytest.mark.parametrize(
    ("values", "has_image", "answers"),
    [
        (("<image>\n" + QUESTION, "rising stripes."), True, "rising stripes.</s>"),
        ((QUESTION, "rising stripes."), False, "rising stripes.</s>"),
        (("<image>\n" + QUESTION, "no stripes.", "Sure?\nReally?", "Yes, 12."), True, "no stripes.</s> Yes, 12.</s>"),
        ((QUESTION, "no.", "And  this: ü?", "ü.", "USER?", "ok."), False, "no.</s> ü.</s> ok.</s>"),
    ],
    ids=["image", "text", "two turns", "three turns"],
)
def test_labels_of_upstream_are_exactly_the_answers(
    upstream, tokenizer, tmp_path, capsys, values, has_image, answers, resaved
):
    if resaved:  # as a checkpoint holds it, from which the second stage starts
        import transformers

        tokenizer.save_pretrained(tmp_path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, model_max_length=512, use_fast=False)
    out = upstream.preprocess_v1(turns(*values), tokenizer, has_image=has_image)
    assert "mismatch" not in capsys.readouterr().out
    ids, labels = out["input_ids"][0], out["labels"][0]
    learnt = labels != -100
    assert torch.equal(ids[learnt], labels[learnt])
    assert "".join(tokenizer.decode(labels[learnt]).split()) == "".join(answers.split())
    assert ids[0] == tokenizer.bos_token_id
    assert int((ids == -200).sum()) == int(has_image)


def test_tokenizer_agrees_with_sentencepiece(tiny_llava, tokenizer):
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(tiny_llava.base / "tokenizer.model"))
    for text in (QUESTION, "USER: \nAnalyze  the\n\n12 ü ASSISTANT: ", response(DRAWN.choices, 0)):
        assert tokenizer(text).input_ids == [1, *reference.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).strip() == text.strip()


def test_llava_depends_on_the_seed_and_on_nothing_else(tiny_llava, drawn_texts, tmp_path):
    state = torch.get_rng_state()
    torch.manual_seed(123)
    again = make_tiny_llava(tmp_path / "again", texts=drawn_texts, seed=0, hidden_size=64, layers=2)
    other = make_tiny_llava(tmp_path / "other", texts=drawn_texts, seed=1, hidden_size=64, layers=2)
    torch.set_rng_state(state)
    for name in ("base/model.safetensors", "base/tokenizer.model", "tower/model.safetensors", "mm_projector.bin"):
        same = sha256_file(again.base.parent / name) == sha256_file(tiny_llava.base.parent / name)
        assert same, name
        differs = sha256_file(other.base.parent / name) != sha256_file(again.base.parent / name)
        assert differs == (name != "base/tokenizer.model"), name


def test_making_a_llava_leaves_the_random_state_alone(drawn_texts, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_tiny_llava(tmp_path / "one", texts=drawn_texts, seed=0, hidden_size=32, layers=2)
    assert torch.equal(torch.rand(3), expected)


def test_widths_that_no_head_fits_are_refused(tmp_path):
    with pytest.raises(VITaskError, match="multiples of 32"):
        make_tiny_llava(tmp_path / "x", texts=["a"], seed=0, hidden_size=100)
    assert not (tmp_path / "x").exists()


def test_stock_llava_loads_the_checkpoint_and_sees_the_image(tiny_checkpoint):
    from vitask_plugin.llava import compat

    compat.prepare()
    from llava.mm_utils import get_model_name_from_path, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(str(tiny_checkpoint))
    tokenizer, model, processor, _ = load_pretrained_model(str(tiny_checkpoint), None, name, device="cpu")
    assert type(model).__name__ == "LlavaLlamaForCausalLM"
    assert model.config.model_type == "llava_llama"
    assert len(tokenizer) == model.config.vocab_size
    assert processor.crop_size["height"] == 28
    model.float()
    ids = tokenizer_image_token(f"USER: <image>\n{QUESTION} ASSISTANT:", tokenizer, return_tensors="pt")[None]
    pixels = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with torch.no_grad():
        logits = [model(input_ids=ids, images=image).logits for image in (pixels, -pixels)]
    assert logits[0].shape == (1, ids.shape[1] - 1 + 16, len(tokenizer))  # 16 image tokens in place of one
    assert not torch.allclose(logits[0][:, -1], logits[1][:, -1])
    answer = model.generate(ids, images=pixels, do_sample=False, max_new_tokens=4)
    assert 1 <= answer.shape[1] <= 4


def test_checkpoint_needs_llava_in_its_name(tiny_llava, tmp_path):
    with pytest.raises(VITaskError, match="'llava' in its name"):
        make_tiny_checkpoint(tmp_path / "model", texts=["a"], seed=0, tower=tiny_llava.tower)


def test_command_writes_a_llava_for_a_medmnist_task(tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(sys, "argv", ["tiny", "--out", str(tmp_path / "out"), "--task", "retinamnist"])
    main()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "base", use_fast=False)
    assert len(tokenizer("severe diabetic retinopathy.").input_ids) < 12  # pieces, not bytes


def test_texts_of_a_task():
    assert task_texts(DRAWN)[:2] == [QUESTION, "Analyze the given drawn texture image."]
    assert task_texts(DRAWN)[2:] == [f"{choice}." for choice in DRAWN.choices]


# Drawn data ----------------------------------------------------------------------------------------------------

SIZES = {"train": 400, "val": 100, "test": 120}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    return draw_dataset(tmp_path_factory.mktemp("drawn") / "drawn.npz", seed=0, sizes=SIZES)


def test_medmnist_itself_reads_the_drawn_file(drawn, monkeypatch):
    import medmnist

    class DrawnMNIST(medmnist.dataset.MedMNIST2D):
        flag = "drawn"

    monkeypatch.setitem(medmnist.INFO, "drawn", {**medmnist.INFO["pathmnist"], "n_samples": SIZES})
    for split, size in SIZES.items():
        data = DrawnMNIST(split=split, root=str(drawn.parent))
        assert len(data) == size
        image, label = data[0]
        assert (image.mode, image.size) == ("RGB", (28, 28))
        assert label.shape == (1,) and 0 <= label[0] < len(DRAWN.choices)
    file = np.load(drawn)
    assert {file[f"{split}_{kind}"].dtype for split in SIZES for kind in ("images", "labels")} == {np.dtype(np.uint8)}


def test_drawing_depends_on_the_seed_and_on_nothing_else(drawn, tmp_path):
    first = np.load(drawn)
    again = np.load(draw_dataset(tmp_path / "again.npz", seed=0, sizes=SIZES))
    assert sha256_file(tmp_path / "again.npz") == sha256_file(drawn)
    other = np.load(draw_dataset(tmp_path / "other.npz", seed=1, sizes=SIZES))
    fewer = np.load(draw_dataset(tmp_path / "fewer.npz", seed=0, sizes={**SIZES, "train": 8}))
    for name in first:
        assert np.array_equal(first[name], again[name]), name
        assert not np.array_equal(first[name], other[name]), name
        if not name.startswith("train"):
            assert np.array_equal(first[name], fewer[name]), name


def test_some_training_labels_are_wrong_and_no_other(drawn):
    """The direction is read off the images by the strongest frequency of the spectrum."""

    def wrong(split: str) -> float:
        file = np.load(drawn)
        found = [strongest_direction(image) for image in file[f"{split}_images"]]
        return float(np.mean(np.array(found) != file[f"{split}_labels"][:, 0]))

    expected = DRAWN_NOISE * (1 - 1 / len(DRAWN.choices))
    assert wrong("test") < 0.08  # what the spectrum misreads in the noise
    assert wrong("val") < 0.12
    assert expected - 0.08 < wrong("train") < expected + 0.12
    labels = np.load(drawn)["test_labels"][:, 0]
    assert np.array_equal(np.bincount(labels), [30] * 4)


def strongest_direction(image: np.ndarray) -> int:
    pixels = image.astype(float)
    spectrum = (np.abs(np.fft.fft2(pixels - pixels.mean(axis=(0, 1)), axes=(0, 1))) ** 2).sum(axis=-1)
    down, right = np.unravel_index(spectrum.argmax(), spectrum.shape)
    frequencies = np.fft.fftfreq(28)
    angle = np.rad2deg(np.arctan2(frequencies[down], frequencies[right])) % 180
    return int(np.argmin([min(abs(angle - d), 180 - abs(angle - d)) for d in (90, 0, 45, 135)]))


def test_nothing_linear_in_the_pixels_tells_the_classes_apart(tmp_path):
    from sklearn.linear_model import RidgeClassifier

    file = np.load(draw_dataset(tmp_path / "d.npz", seed=0, sizes={"train": 1500, "val": 4, "test": 400}))
    images, labels = ({s: file[f"{s}_{kind}"] for s in ("train", "test")} for kind in ("images", "labels"))
    flat = {split: images[split].reshape(len(images[split]), -1) / 255 for split in images}
    probe = RidgeClassifier(alpha=100).fit(flat["train"], labels["train"][:, 0])
    assert probe.score(flat["test"], labels["test"][:, 0]) < 0.4  # chance is 0.25
