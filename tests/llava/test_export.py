"""`vitask export --to hf`: stock transformers load it, and it is the checkpoint: prompts, pixels, scores, answers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from trained import make_trained

from vitask_plugin import cli, model_folder
from vitask_plugin.data.instructions import DRAWN, instruction, response
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file
from vitask_plugin.llava import compat, loading
from vitask_plugin.record import checkpoint

compat.prepare()

from llava.constants import IMAGE_TOKEN_INDEX  # noqa: E402
from llava.conversation import conv_templates  # noqa: E402
from llava.mm_utils import process_images, tokenizer_image_token  # noqa: E402

from vitask_plugin.llava import export_check, export_files  # noqa: E402
from vitask_plugin.llava.chat_template import chat_template  # noqa: E402
from vitask_plugin.llava.export import MARK_FILE, export  # noqa: E402

QUESTIONS = ("What is shown?", "Is it  (a) or (b)?\nOne word: 3.5 %", " leading, ümläut 中 🙂", "trailing \n")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_checkpoint: Path) -> Path:
    """Of the plain tiny checkpoint, through the command. Read only."""
    output = tmp_path_factory.mktemp("exported") / "hf"
    assert cli.main(["export", "--to", "hf", str(tiny_checkpoint), str(output)]) == 0
    return output


def changed(source: Path, target: Path, **settings: object) -> Path:
    """A copy with other entries in its config.json."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | settings))
    return target


def legacy(source: Path, target: Path) -> Path:
    """A copy whose tokenizer puts a space behind each special token, as those of before 2023 do."""
    shutil.copytree(source, target)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    (target / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": True}))
    return target


def stock(folder: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, found = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return model.eval(), AutoProcessor.from_pretrained(folder)


def pictures() -> list[Image.Image]:
    """Not square, not grey, and not those of the command's own check."""
    generator = torch.Generator().manual_seed(5)
    return [
        Image.fromarray(torch.randint(0, 256, (high, wide, 3), dtype=torch.uint8, generator=generator).numpy())
        for wide, high in ((60, 33), (41, 90))
    ]


def chat(image: Image.Image, text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def upstream_prompt(version: str, *turns: str | None) -> str:
    conversation = conv_templates[version].copy()
    for number, words in enumerate(turns):
        conversation.append_message(conversation.roles[number % 2], words)
    return conversation.get_prompt()


@torch.no_grad()
def upstream_scores(loaded: loading.Loaded, image: Image.Image) -> torch.Tensor:
    """Log-likelihood of every label [K], by one plain forward each."""
    pixels = process_images([image], loaded.image_processor, loaded.model.config)
    question = "<image>\n" + instruction(DRAWN.modality, DRAWN.choices)
    found = []
    for label in range(len(DRAWN.choices)):
        words = upstream_prompt("v1", question, response(DRAWN.choices, label))
        ids = tokenizer_image_token(words, loaded.tokenizer, return_tensors="pt")
        start = len(tokenizer_image_token(upstream_prompt("v1", question, None), loaded.tokenizer))
        logits = loaded.model(input_ids=ids[None], images=pixels).logits[0]
        found.append(answer_score(logits, ids[start:]))
    return torch.stack(found)


@torch.no_grad()
def stock_scores(model, processor, image: Image.Image, words: int) -> torch.Tensor:
    question, found = chat(image, instruction(DRAWN.modality, DRAWN.choices)), []
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    start = processor.apply_chat_template(question, add_generation_prompt=True, **settings)["input_ids"].shape[1]
    for label in range(len(DRAWN.choices)):
        answer = [{"type": "text", "text": response(DRAWN.choices, label)}]
        inputs = processor.apply_chat_template([*question, {"role": "assistant", "content": answer}], **settings)
        found.append(answer_score(model(**inputs).logits[0, :, :words], inputs["input_ids"][0, start:]))
    return torch.stack(found)


def answer_score(logits: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    likely = logits[-len(answer) - 1 : -1].log_softmax(dim=-1)
    return sum(row[token] for row, token in zip(likely, answer, strict=True))


@pytest.mark.compat
@pytest.mark.parametrize("kind", ["full", "lora", "vitask", "pad", "cls_patch", "bfloat16", "legacy"])
def test_scores_are_the_checkpoints(
    kind: str, tmp_path: Path, tiny_llava, tiny_checkpoint: Path, request: pytest.FixtureRequest
) -> None:
    source, base, dtype = tiny_checkpoint, None, "auto"
    if kind == "lora":
        source, base = request.getfixturevalue("lora_checkpoint"), tiny_llava.base
    elif kind == "vitask":
        source = make_trained(tmp_path, tiny_checkpoint, "cls").checkpoint
    elif kind == "pad":
        source = changed(tiny_checkpoint, tmp_path / "llava-pad", image_aspect_ratio="pad")
    elif kind == "cls_patch":
        source = changed(tiny_checkpoint, tmp_path / "llava-cls", mm_vision_select_feature="cls_patch")
    elif kind == "legacy":
        source = legacy(tiny_checkpoint, tmp_path / "llava-legacy")
    elif kind == "bfloat16":
        dtype = "bfloat16"
    output = tmp_path / "hf"
    done = export(source, output, base, dtype=dtype)
    assert done["largest_difference"] <= 1e-4 and done["dtype"] == ("bfloat16" if kind == "bfloat16" else "float32")
    loaded = loading.load(source, base)
    if kind == "bfloat16":
        for weight in loaded.model.parameters():
            weight.data = weight.data.bfloat16().float()
    model, processor = stock(output)
    words = len(loaded.tokenizer)
    scores = [upstream_scores(loaded, image) for image in pictures()]
    found = [stock_scores(model, processor, image, words) for image in pictures()]
    assert max((ours - theirs).abs().max() for ours, theirs in zip(scores, found, strict=True)) <= 1e-4
    assert (scores[0] - scores[1]).abs().max() > 1e-3  # they do depend on the image
    carried = kind in ("lora", "vitask")
    assert (output / checkpoint.RECORD_FILE).is_file() == carried
    if carried:
        name = model_folder.CONNECTOR_FILE
        assert sha256_file(output / name) == sha256_file(source / name)
        assert checkpoint.read_record(output)["tsm"] == checkpoint.read_record(source)["tsm"]
        assert not {checkpoint.RUN, checkpoint.FILES} & checkpoint.read_record(output).keys()


@pytest.mark.parametrize("ratio", ["square", "pad"])
def test_pixels_are_upstreams(ratio: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = changed(tiny_checkpoint, tmp_path / "llava", image_aspect_ratio=ratio)
    export(source, tmp_path / "hf")
    loaded = loading.load(source)
    _, processor = stock(tmp_path / "hf")
    for image in (*pictures(), pictures()[0].convert("L").convert("RGB")):
        theirs = process_images([image], loaded.image_processor, loaded.model.config)
        assert torch.equal(processor.image_processor(image, return_tensors="pt")["pixel_values"], theirs)


@pytest.mark.compat
@pytest.mark.parametrize(
    "version", ["v1", "llava_v1", "default", "llava_v0", "llama_2", "llava_llama_2", "mistral_instruct"]
)
@pytest.mark.parametrize("old", [False, True], ids=["tokenizer", "legacy-tokenizer"])
def test_prompts_are_token_identical(version: str, old: bool, tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = legacy(tiny_checkpoint, tmp_path / "llava") if old else tiny_checkpoint
    own, fast = loading.load(source).tokenizer, export_files.fast_tokenizer(source)
    fast.chat_template = chat_template(conv_templates[version], own, fast, start_end=False)
    image = fast.convert_tokens_to_ids("<image>")
    for question in QUESTIONS:
        for count in (0, 1, 2):
            asked = [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": question}]}]
            found = fast.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
            theirs = tokenizer_image_token(upstream_prompt(version, "<image>\n" * count + question, None), own)
            assert found == [image if token == IMAGE_TOKEN_INDEX else token for token in theirs]
            assert found.count(image) == count


def test_later_turns_and_system_messages_stand_where_upstream_has_them(tiny_checkpoint: Path) -> None:
    own, fast = loading.load(tiny_checkpoint).tokenizer, export_files.fast_tokenizer(tiny_checkpoint)
    for version in ("v1", "llama_2", "llava_v0"):
        template = chat_template(conv_templates[version], own, fast, start_end=False)
        words = ("What is it?", "Stripes.", "Sure?", None)
        said = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(words[:3])]

        def render(messages: list[dict], template: str = template) -> str:
            options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
            return fast.apply_chat_template(messages, **options).removeprefix("<s>").removeprefix(" ")

        assert render(said) == upstream_prompt(version, *words)
        other = upstream_prompt(version, *words).replace(conv_templates[version].system, "Be brief.")
        assert render([{"role": "system", "content": "Be brief."}, *said]) == other
        with pytest.raises(Exception, match="must alternate"):
            render(said[1:])
    mistral = chat_template(conv_templates["mistral_instruct"], own, fast, start_end=False)
    with pytest.raises(Exception, match="no place for a system message"):
        fast.apply_chat_template([{"role": "system", "content": "x"}, *said], chat_template=mistral)


def test_images_between_tokens_of_their_own(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """`--mm_use_im_start_end True`: the tokenizer and the word embeddings are longer."""
    source = shutil.copytree(tiny_checkpoint, tmp_path / "llava-start-end")
    loaded = loading.load(source)
    loaded.tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    loaded.model.resize_token_embeddings(len(loaded.tokenizer), mean_resizing=False)
    loaded.model.config.mm_use_im_start_end = True
    loaded.model.save_pretrained(
        source, state_dict={n: w for n, w in loaded.model.state_dict().items() if "vision_tower" not in n}
    )
    loaded.tokenizer.save_pretrained(source)
    loading.name_stock_architecture(source)
    assert export(source, tmp_path / "hf")["largest_difference"] <= 1e-4
    _, processor = stock(tmp_path / "hf")
    shown = processor.apply_chat_template(chat(pictures()[0], "What?"), tokenize=False, add_generation_prompt=True)
    assert "<im_start><image><im_end>\nWhat?" in shown


@pytest.mark.compat
def test_the_pipeline_answers_as_upstream(exported: Path, tiny_checkpoint: Path) -> None:
    from transformers import pipeline

    loaded = loading.load(tiny_checkpoint)
    answering = pipeline("image-text-to-text", model=str(exported), dtype=torch.float32, device="cpu")
    answers = set()
    for question in (instruction(DRAWN.modality, DRAWN.choices), "What is this?"):
        for image in pictures():
            prompt = upstream_prompt("v1", f"<image>\n{question}", None)
            ids = tokenizer_image_token(prompt, loaded.tokenizer, return_tensors="pt")[None]
            pixels = process_images([image], loaded.image_processor, loaded.model.config)
            settings = {"do_sample": False, "max_new_tokens": 12}
            theirs = loaded.model.generate(ids, images=pixels, attention_mask=torch.ones_like(ids), **settings)
            [found] = answering(text=chat(image, question), return_full_text=False, generate_kwargs=settings)
            # Halves of characters, which random weights answer with, become other text in each tokenizer's hands.
            expected = answering.tokenizer.batch_decode(theirs, skip_special_tokens=True)[0]
            assert found["generated_text"].strip() == expected.strip()
            answers.add(expected.strip())
    assert len(answers) > 1 and all(answers)


def test_added_tokens_are_never_the_answer(exported: Path, tiny_checkpoint: Path) -> None:
    model, processor = stock(exported)
    words = model.config.image_token_id
    assert model.config.text_config.vocab_size == words + 1 == len(processor.tokenizer)
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert torch.allclose(matrix[words], matrix[:words].mean(dim=0), atol=1e-7)
    states = torch.randn(500, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = model.lm_head(states)
    assert (logits[:, words] < logits[:, :words].max(dim=-1).values).all()
    assert (logits.softmax(dim=-1)[:, words] <= 1 / words).all()
    config = json.loads((exported / "generation_config.json").read_text())
    assert config["suppress_tokens"] == [words] and config["eos_token_id"] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.pad_token_id != words and processor.tokenizer.padding_side == "left"
    assert processor(text="a", return_tensors="pt").keys() == {"input_ids", "attention_mask"}
    names = (exported / "chat_template.jinja").read_text()
    assert "for message in messages -%}" in names and "for part in message['content']" in names


def test_a_template_whose_answers_end_with_a_text_names_it(tmp_path: Path, tiny_checkpoint: Path, capsys) -> None:
    source = make_trained(tmp_path, tiny_checkpoint, "cls").checkpoint
    record = json.loads((source / checkpoint.RECORD_FILE).read_text())
    (source / checkpoint.RECORD_FILE).write_text(json.dumps({**record, "version": "llava_v0"}))
    assert cli.main(["export", "--to", "hf", str(source), str(tmp_path / "hf")]) == 0
    assert "answers end with the text '###', not with a token" in capsys.readouterr().out
    _, processor = stock(tmp_path / "hf")
    shown = processor.apply_chat_template(chat(pictures()[0], "What?"), tokenize=False, add_generation_prompt=True)
    assert shown.endswith("questions.###Human: <image> \nWhat?###Assistant:")


@pytest.mark.parametrize(
    "wrong",
    [{"vision_feature_layer": -1}, {"vision_feature_select_strategy": "full"}, {"projector_hidden_act": "relu"}],
)
def test_another_model_is_not_published(wrong: dict, tmp_path: Path, tiny_checkpoint: Path, monkeypatch) -> None:
    right = export_files.save_weights

    def save_weights(model, rows, dtype, directory: Path) -> None:
        right(model, rows, dtype, directory)
        for name in ("config.json", "processor_config.json"):
            settings = json.loads((directory / name).read_text())
            settings |= {key: value for key, value in wrong.items() if key in settings}
            (directory / name).write_text(json.dumps(settings))

    monkeypatch.setattr(export_files, "save_weights", save_weights)
    with pytest.raises(VITaskError, match=r"scores labels [\d.e-]+ nats from the checkpoint.*nothing was written"):
        export(tiny_checkpoint, tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_other_pixels_and_other_prompts_are_not_published(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crop where the checkpoint pads, and a template that leaves out the space behind an image."""
    from transformers import CLIPImageProcessor

    source = changed(tiny_checkpoint, tmp_path / "llava", image_aspect_ratio="pad")
    with monkeypatch.context() as patch:
        patch.setattr(export_files, "LlavaImageProcessor", lambda do_pad, **rest: CLIPImageProcessor(**rest))
        with pytest.raises(VITaskError, match="nats from the checkpoint"):
            export(source, tmp_path / "hf")
    from vitask_plugin.llava import chat_template as templates

    with monkeypatch.context() as patch:
        patch.setattr(templates, "_TRIED", ())
        with pytest.raises(VITaskError, match="reads a question as other tokens"):
            export(tiny_checkpoint, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


def test_large_weights_are_divided(exported: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(export_files, "SHARD", 300_000)
    export(tiny_checkpoint, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    one, several = stock(exported)[0].state_dict(), stock(tmp_path / "hf")[0].state_dict()
    assert one.keys() == several.keys() and all(torch.equal(one[name], several[name]) for name in one)
    monkeypatch.undo()
    export(tiny_checkpoint, tmp_path / "hf")  # over its own earlier output, of which nothing is left
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == sorted(p.name for p in exported.iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_aspect_ratio": "anyres"}, "takes several views"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "takes several views"),
        ({"mm_projector_type": "linear"}, "projector .* is 'linear'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "projector .* is 'mlp3x_gelu'"),
        ({"model_type": "mpt"}, "model_type mpt"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    settings: dict, said: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    source = changed(tiny_checkpoint, tmp_path / "llava", **settings)
    with pytest.raises(VITaskError, match=said):
        export(source, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["llava"]


def test_wrong_folders_are_refused(
    tmp_path: Path, tiny_llava, tiny_checkpoint: Path, lora_checkpoint: Path, exported: Path
) -> None:
    with pytest.raises(VITaskError, match=r"is a LoRA checkpoint.*--model-base"):
        export(lora_checkpoint, tmp_path / "hf")
    with pytest.raises(VITaskError, match=r"holds no adapter.*leave that out"):
        export(tiny_checkpoint, tmp_path / "hf", tiny_llava.base)
    with pytest.raises(VITaskError, match="transformers' own LLaVA"):
        export(exported, tmp_path / "hf")
    # A model of somebody's has files of the same names, and is not replaced.
    mine = shutil.copytree(exported, tmp_path / "mine")
    (mine / MARK_FILE).unlink()
    with pytest.raises(VITaskError, match="not an earlier output"):
        export(tiny_checkpoint, mine)
    assert len(list(mine.iterdir())) == len(list(exported.iterdir())) - 1
    assert not (tmp_path / "hf").exists()


def test_the_check_looks_at_images_of_more_than_one_shape() -> None:
    sizes = [image.size for image in export_check.drawn_images()]
    assert len(set(sizes)) == 2 and all(wide != high for wide, high in sizes)
