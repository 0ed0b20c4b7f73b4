"""`python -m vitask_plugin.hf.train`: both stages, full and LoRA, in every family, and what is saved.

Two processes, ZeRO and a killed run are in tests/equivalence.
"""

import json
import os

import pytest
import torch
import transformers
from hf_models import picture, turns
from hf_runs import LORA, history, plain, train, vitask, weights
from safetensors.torch import load_file

from vitask_plugin.hf import loading
from vitask_plugin.hf.tiny import FAMILIES
from vitask_plugin.model_folder import has_adapter
from vitask_plugin.record.checkpoint import RECORD_FILE
from vitask_plugin.record.connector_file import CONNECTOR_FILE

pytestmark = pytest.mark.compat

TUNINGS = {"full": (), "lora": LORA}
TERMS = {"loss", "loss_vanilla", "loss_ep", "loss_rda"}
# Of the largest logit: merged adapters and adapters beside the weights are other sums.
MERGED = 1e-5


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_hf, sized_mixture, sized_mixture_features):
    """(family, tuning) to the outputs of both stages."""
    root, made = tmp_path_factory.mktemp("hf-runs"), {}

    def of(family: str, tuning: str):
        if (family, tuning) not in made:
            outputs = [root / f"{family}-{tuning}-{stage}" for stage in (1, 2)]
            model = tiny_hf(family).folder
            more = TUNINGS[tuning]
            train(vitask(model, sized_mixture, sized_mixture_features, outputs[0], *more))
            start = outputs[0] if tuning == "full" else model
            earlier = ["--vitask_stage", "2", "--vitask_connector_path", str(outputs[0])]
            train(vitask(start, sized_mixture, sized_mixture_features, outputs[1], *more, *earlier))
            made[family, tuning] = outputs
        return made[family, tuning]

    return of


def seen(output):
    """What `witness` saw: {name: (before, after)} of every parameter, as hashes."""
    return json.loads((output.parent / f"log-{output.name}" / "rank-0.json").read_text())["weights"]


def printed(output) -> str:
    return (output.parent / f"log-{output.name}" / "rank-0.log").read_text()


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_both_stages_train_what_they_should(self, family, tuning, trained):
        for stage, output in enumerate(trained(family, tuning), 1):
            log = history(output)
            assert len(log) == 4
            assert all(entry.keys() >= TERMS | ({"loss_crt"} if stage == 2 else set()) for entry in log)
            assert all(0 < entry["loss"] < 100 for entry in log)
            assert "engine: packed, " in printed(output)

            same = {name for name, (before, after) in seen(output).items() if before == after}
            moved = set(seen(output)) - same
            projector = {name for name in seen(output) if "projector" in name or "merger" in name or "newline" in name}
            tower = {name for name in seen(output) if name.startswith("vision_tower")}
            connector = {name for name in seen(output) if "vitask_connector" in name}
            assert len(tower) > 10 and tower <= same
            assert len(connector) == 4 and connector <= (moved if stage == 1 else same)
            # Beside adapters lies the base's own projector; a bare parameter is not trained there.
            copies = {name for name in projector if "modules_to_save" in name}
            trained_projector = projector if tuning == "full" else copies
            # Added behind the last layer of a decoder this small, where nobody looks at an image any more.
            trained_projector = {name for name in trained_projector if "deepstack_merger_list.1" not in name}
            assert trained_projector and trained_projector <= moved
            layers = {name for name in seen(output) if "language_model.layers" in name}
            adapters = {name for name in layers if "lora_" in name}
            assert bool(adapters) == (tuning == "lora")
            learnt = adapters or layers
            assert len(learnt & moved) > 0.9 * len(learnt)
            assert layers - learnt <= same

    def test_stage_2_ends_with_the_connector_of_stage_1(self, family, tuning, trained):
        first, second = (load_file(output / CONNECTOR_FILE) for output in trained(family, tuning))
        assert first.keys() == second.keys() and all(torch.equal(second[name], first[name]) for name in first)

    def test_stock_classes_load_it_and_answer_alike(self, family, tuning, trained, tiny_hf):
        """Without an exemplar a checkpoint is a plain one: the logits are those of our own loading."""
        output, tiny = trained(family, tuning)[1], tiny_hf(family)
        assert {CONNECTOR_FILE, RECORD_FILE} <= {path.name for path in output.iterdir()}
        encoded = tiny.template.encode(turns("<image>\nWhat is this texture?", "rising stripes."), [picture(28, 56)])
        inputs = {"input_ids": encoded.ids[None], "attention_mask": torch.ones_like(encoded.ids[None])}
        inputs |= encoded.inputs
        if tuning == "full":
            stock, report = transformers.AutoModelForImageTextToText.from_pretrained(output, output_loading_info=True)
            assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            bound = 0.0
        else:
            from peft import PeftModel

            base = transformers.AutoModelForImageTextToText.from_pretrained(tiny.folder)
            stock, bound = PeftModel.from_pretrained(base, output), MERGED
        loaded = loading.load(output)
        with torch.no_grad():
            theirs, ours = (model.eval()(**inputs).logits for model in (stock, loaded.model))
            before = tiny.model()(**inputs).logits
        assert float((ours - theirs).abs().max()) <= bound * float(theirs.abs().max())
        assert float((ours - before).abs().max()) > 1e-2
        assert loaded.record["tsm"] is not None and loaded.model.vitask_connector is not None

    def test_processor_and_settings_of_answering_are_beside_it(self, family, tuning, trained, tiny_hf):
        output, tiny = trained(family, tuning)[1], tiny_hf(family)
        processor = transformers.AutoProcessor.from_pretrained(output)
        assert type(processor) is type(tiny.processor)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}]
        text = processor.apply_chat_template(chat, add_generation_prompt=True)
        assert text == tiny.processor.apply_chat_template(chat, add_generation_prompt=True)
        found, stock = (one(text=[text], images=[[picture(28, 56)]]) for one in (processor, tiny.processor))
        assert found["input_ids"] == stock["input_ids"]
        if tuning == "full":
            settings = transformers.GenerationConfig.from_pretrained(output)
            # transformers 4's Trainer puts the tokenizer's end token before those that are there already.
            assert ends(settings) == ends(tiny.model().generation_config)
            config = transformers.AutoConfig.from_pretrained(output)
            assert config.architectures == [type(tiny.model()).__name__]
            assert config.tie_word_embeddings == tiny.config.tie_word_embeddings
            # As a model that is asked is: training turns the cache of keys and values off.
            text_config = config.get_text_config()
            assert getattr(text_config, "use_cache", True) and getattr(config, "use_cache", True)


def ends(settings: transformers.GenerationConfig) -> set[int]:
    found = settings.eos_token_id
    return set(found if isinstance(found, list) else [found])


# Off means absent


def stock_script(tiny, data, output, tuning: str) -> None:
    """The run as transformers' users write it: stock class, stock Trainer, PEFT as its documentation says."""
    from vitask_plugin.data.instructions import read_samples
    from vitask_plugin.hf.batch import EncodedSamples, PlainBatches

    args = transformers.TrainingArguments(
        output_dir=str(output),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    transformers.set_seed(args.seed)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny.folder, dtype=torch.float32)
    model.config.use_cache = False
    if tuning == "lora":
        from peft import LoraConfig, get_peft_model

        names = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
        config = LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.({names})",
            modules_to_save=["visual.merger", "visual.deepstack_merger_list.0", "visual.deepstack_merger_list.1"],
            task_type="CAUSAL_LM",
        )
        model.requires_grad_(False)
        model = get_peft_model(model, config)
    else:
        for name, weight in model.named_parameters():
            weight.requires_grad_("visual" not in name or "merger" in name)
    samples = EncodedSamples(read_samples(str(data / "train.json")), str(data / "images"), tiny.template, 512)
    trainer = transformers.Trainer(
        model=model,
        args=args,
        train_dataset=samples,
        data_collator=PlainBatches(tiny.template.tokenizer.pad_token_id),
        processing_class=tiny.processor,
    )
    trainer.train()
    trainer.save_state()
    trainer.save_model(str(output))


@pytest.mark.parametrize("tuning", TUNINGS)
def test_without_vitask_the_run_is_that_of_a_plain_script(tuning, tiny_hf, sized_mixture, tmp_path):
    tiny = tiny_hf("qwen3_vl")
    stock_script(tiny, sized_mixture, tmp_path / "stock", tuning)
    train(plain(tiny.folder, sized_mixture, tmp_path / "ours", *TUNINGS[tuning]))
    theirs, ours = history(tmp_path / "stock"), history(tmp_path / "ours")
    assert len(theirs) == 4
    assert [(entry["loss"], entry["grad_norm"]) for entry in ours] == [(e["loss"], e["grad_norm"]) for e in theirs]
    expected, found = weights(tmp_path / "stock"), weights(tmp_path / "ours")
    assert found.keys() == expected.keys() and len(expected) > 10
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not (tmp_path / "ours" / RECORD_FILE).exists()
    assert has_adapter(tmp_path / "ours") == (tuning == "lora")


# Kinds of run


@pytest.fixture(scope="session")
def reference(trained):
    return lambda family, tuning="full": trained(family, tuning)[0]


def losses(output) -> torch.Tensor:
    return torch.tensor([[entry[name] for name in sorted(TERMS)] for entry in history(output)])


@pytest.mark.parametrize(("family", "tuning"), [("gemma3", "full"), ("qwen3_vl", "lora"), ("llava_onevision", "lora")])
def test_gradient_checkpointing_gives_the_same_losses(
    family, tuning, reference, tiny_hf, sized_mixture, sized_mixture_features, tmp_path
):
    flags = ("--gradient_checkpointing", "True", *TUNINGS[tuning])
    train(vitask(tiny_hf(family).folder, sized_mixture, sized_mixture_features, tmp_path / "run", *flags))
    assert torch.allclose(losses(tmp_path / "run"), losses(reference(family, tuning)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ("--vitask_engine", "branches"),
        ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"),
        ("--attn_implementation", "eager"),
    ],
    ids=["branches", "accumulation", "eager"],
)
def test_other_ways_give_the_same_losses(flags, reference, tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    train(vitask(tiny_hf("qwen3_vl").folder, sized_mixture, sized_mixture_features, tmp_path / "run", *flags))
    assert torch.allclose(losses(tmp_path / "run"), losses(reference("qwen3_vl")), rtol=0, atol=1e-5)


def test_checkpoints_on_the_way_are_those_of_stock_classes(tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    tiny, output = tiny_hf("internvl"), tmp_path / "run"
    saving = ("--save_strategy", "steps", "--save_steps", "2")
    flags = vitask(tiny.folder, sized_mixture, sized_mixture_features, output, *saving)
    train(flags)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    _, report = transformers.AutoModelForImageTextToText.from_pretrained(
        output / "checkpoint-4", output_loading_info=True
    )
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    transformers.AutoProcessor.from_pretrained(output / "checkpoint-4")
    assert loading.load(output / "checkpoint-2").model.vitask_connector is not None
    # Resumed from the middle, since the last one is not whole, it ends as it did.
    whole = weights(output)
    os.truncate(output / "checkpoint-4" / "model.safetensors", 1000)
    for path in output.glob("*.safetensors"):
        path.unlink()
    train(flags)
    assert "passed over: model.safetensors has 1000 of" in printed(output)
    assert "resuming from checkpoint-2" in printed(output)
    again = weights(output)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)


def test_group_and_rate_of_the_connector(tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    more = ("--vitask_connector_lr", "1e-2", "--max_steps", "1")
    output = train(vitask(tiny_hf("llava").folder, sized_mixture, sized_mixture_features, tmp_path / "run", *more))
    assert "connector 0.01" in printed(output)
