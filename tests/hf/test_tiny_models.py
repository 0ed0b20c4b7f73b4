"""The tiny models of every family: stock classes load them offline, and what makes each family special is in them."""

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from vitask_plugin.data.instructions import DRAWN, instruction, response
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.hf.tiny import FAMILIES, OTHERS, main, make_tiny
from vitask_plugin.hf.tiny_families import TABLE
from vitask_plugin.hf.tiny_templates import CHATS

pytestmark = pytest.mark.compat

QUESTION, ANSWER = instruction(DRAWN.modality, DRAWN.choices), response(DRAWN.choices, 3)
SIZES = ((28, 28), (28, 56), (56, 28), (40, 70))  # heights and widths
INSTALLED = [family for family in (*FAMILIES, *OTHERS) if TABLE[family].model_type in transformers.CONFIG_MAPPING]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def user(text: str, *, image: bool = True) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * image + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def load(folder: Path):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, drawn_texts: list[str]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny-hf")
    return {family: make_tiny(root / family, family=family, texts=drawn_texts, seed=0) for family in INSTALLED}


@pytest.fixture(scope="module", params=INSTALLED)
def tiny(request: pytest.FixtureRequest, folders: dict[str, Path]) -> SimpleNamespace:
    """One family, loaded once. Its weights and settings stay as they are."""
    folder = folders[request.param]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return SimpleNamespace(family=request.param, folder=folder, model=load(folder), processor=processor)


def prompt(processor, *turns: dict, start: bool = True) -> str:
    return processor.apply_chat_template(list(turns), add_generation_prompt=start)


def inputs_of(processor, texts: list[str], pictures: list[Image.Image]):
    """What the model takes, padded on the right."""
    images = [[image] for image in pictures]
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right")
    inputs.pop("labels", None)  # PaliGemma's, unasked
    return inputs


def logits_of(model, inputs) -> torch.Tensor:
    """Logits [B, L, V] of one forward."""
    with torch.no_grad():
        return model(**inputs).logits


def moved(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().max().item()


def test_stock_classes_load_it_without_a_network(tiny, monkeypatch) -> None:
    def refused(*_):
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(tiny.folder, output_loading_info=True)
    processor = transformers.AutoProcessor.from_pretrained(tiny.folder)
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert model.config.model_type == TABLE[tiny.family].model_type
    assert type(processor).__name__ == TABLE[tiny.family].processor_class
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == model.config.tie_word_embeddings


def test_image_tokens_are_as_many_as_image_features(tiny) -> None:
    text = prompt(tiny.processor, user(QUESTION))
    counts = []
    for height, width in SIZES:
        inputs = inputs_of(tiny.processor, [text], [picture(height, width)])
        counts.append(int((inputs["input_ids"] == tiny.model.config.image_token_id).sum()))
        assert torch.isfinite(logits_of(tiny.model, inputs)).all()  # the model counts its features itself
    assert tiny.processor.tokenizer.convert_tokens_to_ids(CHATS[tiny.family].image) == tiny.model.config.image_token_id
    depends = tiny.family in ("llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
    assert all(4 <= count <= 56 for count in counts)
    assert (len(set(counts)) > 1) == depends, counts


def test_image_and_order_of_words_move_the_answer(tiny) -> None:
    text = prompt(tiny.processor, user("Why?"), assistant(ANSWER), start=False)
    first, other = (inputs_of(tiny.processor, [text], [picture(28, 28, seed)]) for seed in (0, 1))
    logits = logits_of(tiny.model, first)
    place = first["input_ids"].shape[1] - 3  # in or next to the answer
    assert moved(logits[:, place], logits_of(tiny.model, other)[:, place]) > 1e-2

    row = first["input_ids"][0]
    left, right = place - 3, place - 2
    assert row[left] != row[right]
    row[[left, right]] = row[[right, left]]
    assert moved(logits[:, place], logits_of(tiny.model, first)[:, place]) > 1e-2


def test_images_of_two_sizes_in_a_batch_are_read_as_alone(tiny) -> None:
    texts = [
        prompt(tiny.processor, user(QUESTION), assistant(ANSWER), start=False),
        prompt(tiny.processor, user("Hm?")),
    ]
    pictures = [picture(28, 28), picture(28, 56)]
    both = logits_of(tiny.model, inputs_of(tiny.processor, texts, pictures))
    for index in range(2):
        alone = logits_of(tiny.model, inputs_of(tiny.processor, [texts[index]], [pictures[index]]))
        assert moved(alone[0], both[index, : alone.shape[1]]) < 1e-4


def test_prompt_is_a_prefix_of_the_conversation(tiny) -> None:
    turns = [user(QUESTION), assistant(ANSWER), user("Sure?", image=False), assistant("Yes.")]
    for number in (1, 3):
        whole = prompt(tiny.processor, *turns[: number + 1], start=False)
        before = prompt(tiny.processor, *turns[:number])
        assert whole.startswith(before)
        answer = whole[len(before) :].strip()
        assert answer.startswith(turns[number]["content"][0]["text"])
        ends = CHATS[tiny.family].ends
        assert answer.endswith(ends) or tiny.family in ("llava", "mistral_window")  # these have no end in the template


def test_text_comes_back_and_special_tokens_are_one_piece(tiny, drawn_texts) -> None:
    tokenizer = tiny.processor.tokenizer
    for text in [*drawn_texts, "Never seen:  ü,\n\n7 ≠ 8\t<b>"]:
        encoded = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(encoded) == text
    chat = CHATS[tiny.family]
    for token in filter(None, (chat.bos, chat.eos, chat.pad, *chat.special, *chat.named.values())):
        encoded = tokenizer(token, add_special_tokens=False)["input_ids"]
        assert len(encoded) == 1
        assert tokenizer.decode(encoded, skip_special_tokens=True) == ""
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id or not chat.adds_bos
    ends = tiny.model.generation_config.eos_token_id
    assert tokenizer.convert_ids_to_tokens(ends) == list(chat.ends)


@pytest.mark.parametrize("family", INSTALLED)
def test_same_seed_same_folder(family, folders, drawn_texts, tmp_path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    again = make_tiny(tmp_path / "again", family=family, texts=drawn_texts, seed=0)
    assert torch.equal(torch.rand(1), expected)  # the caller's random state is its own
    hashes = [{p.name: sha256_file(p) for p in folder.iterdir()} for folder in (folders[family], again)]
    assert hashes[0] == hashes[1]
    other = make_tiny(tmp_path / "other", family=family, texts=drawn_texts, seed=1)
    assert sha256_file(other / "model.safetensors") != hashes[0]["model.safetensors"]
    assert sha256_file(other / "tokenizer.json") == hashes[0]["tokenizer.json"]


def full_window(model, inputs) -> None:
    model.config.get_text_config().sliding_window = 1000
    for layer in model.model.language_model.layers:
        if getattr(layer.self_attn, "sliding_window", None):
            layer.self_attn.sliding_window = 1000


def no_image_blocks(model, inputs) -> None:
    inputs["token_type_ids"] = torch.zeros_like(inputs["token_type_ids"])


def last_tower_layer(model, inputs) -> None:
    model.config.vision_feature_layer = -1
    model.model.config.vision_feature_layer = -1


def plain_positions(model, inputs) -> None:
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)


def full_attention_in_the_tower(model, inputs) -> None:
    model.model.visual.fullatt_block_indexes = [0, 1]


def no_deep_stack(model, inputs) -> None:
    for merger in model.model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
        torch.nn.init.zeros_(merger.linear_fc2.bias)


def no_ends_of_rows(model, inputs) -> None:
    torch.nn.init.zeros_(model.model.image_newline)


@pytest.mark.parametrize(
    ("family", "without"),
    [
        ("llava", last_tower_layer),
        ("llava_onevision", no_ends_of_rows),
        ("qwen2_5_vl", plain_positions),
        ("qwen2_5_vl", full_attention_in_the_tower),
        ("qwen3_vl", plain_positions),
        ("qwen3_vl", no_deep_stack),
        ("gemma3", full_window),
        ("gemma3", no_image_blocks),
        ("mistral_window", full_window),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_makes_the_family_special_moves_the_logits(folders, family, without) -> None:
    if family not in folders:
        pytest.skip(f"the installed transformers has no {family}")
    processor, model = transformers.AutoProcessor.from_pretrained(folders[family]), load(folders[family])
    inputs = inputs_of(processor, [prompt(processor, user(QUESTION))], [picture(56, 28)])
    before = logits_of(model, inputs)
    without(model, inputs)
    assert moved(before, logits_of(model, inputs)) > 1e-2


def test_one_linear_and_one_full_layer(folders) -> None:
    if "qwen3_5" not in folders:
        pytest.skip("the installed transformers has no qwen3_5")
    kinds = load(folders["qwen3_5"]).config.get_text_config().layer_types
    assert kinds == ["linear_attention", "full_attention"]


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_image_states_depend_on_the_question_only_in_paligemma(folders, family) -> None:
    """What packing may not assume: PaliGemma's image tokens see the question behind them."""
    processor, model = transformers.AutoProcessor.from_pretrained(folders[family]), load(folders[family])
    states = []
    for question in ("Why?", "How so?"):
        inputs = inputs_of(processor, [prompt(processor, user(question))], [picture(28, 28)])
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        states.append(hidden[inputs["input_ids"] == model.config.image_token_id])
    difference = moved(*states)
    assert difference > 1e-2 if family == "paligemma" else difference < 1e-5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"family": "llama"}, "family='llama' is not known; use one of llava, "),
        ({"hidden_size": 96}, "hidden_size=96 must be a multiple of 64"),
        ({"layers": 1}, "layers=1 at least 2"),
        ({"image_size": 30}, "image_size=30 one of 4"),
    ],
)
def test_wrong_arguments_leave_nothing(tmp_path, changed, message) -> None:
    with pytest.raises(VITaskError, match=message):
        make_tiny(tmp_path / "tiny", **{"family": "llava", "texts": ["a"], "seed": 0, **changed})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", INSTALLED)
def test_other_sizes_load_and_run(family, tmp_path, drawn_texts) -> None:
    folder = make_tiny(
        tmp_path / "tiny", family=family, texts=drawn_texts, seed=0, hidden_size=128, layers=3, image_size=56
    )
    processor, model = transformers.AutoProcessor.from_pretrained(folder), load(folder)
    inputs = inputs_of(processor, [prompt(processor, user(QUESTION))], [picture(56, 70)])
    assert torch.isfinite(logits_of(model, inputs)).all()
    text = model.config.get_text_config()
    assert (text.hidden_size, text.num_hidden_layers) == (128, 3)


def test_command(tmp_path, monkeypatch) -> None:
    arguments = ["tiny", "--family", "internvl", "--out", str(tmp_path / "tiny"), "--task", "breast", "--seed", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "tiny")
    # A word of the task is one piece.
    assert len(processor.tokenizer(" malignant", add_special_tokens=False)["input_ids"]) == 1
