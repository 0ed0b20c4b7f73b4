"""No way of loading or training rounds a buffer, and what is trained is float32 where DeepSpeed keeps no copies."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from mixture import flags
from ranks import launch
from runs import LORA
from safetensors.torch import load_file

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
LEARNING_RATE, STEPS = "2e-5", "40"


def record(path: Path) -> None:
    """In the rank: dtypes in its first step, and the trained weights before and after training."""
    from vitask_plugin.llava.trainer import VITaskTrainer

    train, step = VITaskTrainer.train, VITaskTrainer.training_step
    seen: dict = {}

    @functools.wraps(step)
    def training_step(self, model, *args, **kwargs):
        if "buffers" not in seen:
            parts = [self._vlm, self._vlm.get_vision_tower()]
            named = [item for part in parts for item in part.named_buffers()]
            seen["buffers"] = {name: buffer for name, buffer in named if buffer.is_floating_point()}
            seen["trained"] = {p.dtype for p in self.model.parameters() if p.requires_grad}
            layers = self._vlm.model.layers.named_parameters()
            seen["frozen"] = {p.dtype for name, p in layers if not p.requires_grad and "lora_" not in name}
        return step(self, model, *args, **kwargs)

    @functools.wraps(train)
    def watched(self, *args, **kwargs):
        start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        train(self, *args, **kwargs)
        seen["moved"] = {
            name: ((p.detach() != start[name]).sum().item(), p.numel())
            for name, p in self.model.named_parameters()
            if name in start and p.shape == start[name].shape  # ZeRO-3 has divided them since
        }
        torch.save(seen, path)

    VITaskTrainer.training_step, VITaskTrainer.train = training_step, watched
    _give_the_tower_a_table()


def _give_the_tower_a_table() -> None:
    """A non-persistent float32 buffer in the vision tower, as those with rotary embeddings have."""
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    load = CLIPVisionTower.load_model

    def load_model(self, *args, **kwargs):
        load(self, *args, **kwargs)
        self.vision_tower.register_buffer("table", torch.full((4,), 1 / 3), persistent=False)

    CLIPVisionTower.load_model = load_model


def quantized(path: Path) -> None:
    """`record`, and the names of the modules that bitsandbytes holds."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from vitask_plugin.llava.trainer import VITaskTrainer

    step = VITaskTrainer.training_step

    @functools.wraps(step)
    def training_step(self, model, *args, **kwargs):
        modules = self._vlm.named_modules()
        names = [name for name, each in modules if isinstance(each, Linear4bit | Linear8bitLt)]
        path.with_suffix(".json").write_text(json.dumps(names))
        return step(self, model, *args, **kwargs)

    VITaskTrainer.training_step = training_step
    record(path)


@pytest.fixture
def trained(tiny_llava, tiny_checkpoint, mixture, mixture_features, tmp_path):
    """Runs from a checkpoint that has a projector, as released ones do: the output, and what `record` saw."""

    def run(*more: str, before=record, processes: int = 1) -> tuple[Path, dict]:
        output, seen = tmp_path / "llava-out", tmp_path / "seen.pt"
        own = ["--model_name_or_path", str(tiny_checkpoint), "--learning_rate", LEARNING_RATE]
        own += ["--per_device_train_batch_size", "8", "--lr_scheduler_type", "constant", "--max_steps", "2", *more]
        command = flags(tiny_llava, mixture, mixture_features, output, *own)
        ended = launch(processes, command, tmp_path / "logs", before={0: functools.partial(before, seen)})
        assert ended.statuses == [0] * processes, ended.text
        return output, torch.load(seen, weights_only=True)

    return run


def share(seen: dict, part: str) -> float:
    moved = [found for name, found in seen["moved"].items() if part in name and "vitask_connector" not in name]
    return sum(count for count, _ in moved) / sum(size for _, size in moved)


def assert_exact(buffers: dict[str, torch.Tensor]) -> None:
    """Rotary table and the tower's: float32, with values that no 16-bit number has."""
    tables = [buffer for name, buffer in buffers.items() if name.endswith(("inv_freq", "table"))]
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
    assert sum("inv_freq" in name for name in buffers) >= 2 and any("table" in name for name in buffers)
    assert all((table != table.bfloat16()).any() and (table != table.half()).any() for table in tables)


PATHS = {
    "full-bf16": ["--bf16", "True"],
    "full-fp16": ["--fp16", "True"],
    "lora-bf16": ["--bf16", "True", *LORA],
    "lora-fp16": ["--fp16", "True", *LORA],
    "projector-bf16": ["--bf16", "True", *LORA, "--tune_mm_mlp_adapter", "True"],
}


@pytest.mark.parametrize("more", PATHS.values(), ids=PATHS)
def test_the_first_step_without_deepspeed(more, trained):
    output, seen = trained(*more)
    assert_exact(seen["buffers"])
    assert seen["trained"] == {torch.float32}
    half = HALF["bf16" if "--bf16" in more else "fp16"]
    if "--lora_enable" in more:
        assert seen["frozen"] == {half}
    # The files are of the dtype that the run started from.
    weights = load_file(output / "model.safetensors") if "--lora_enable" not in more else {}
    if more == PATHS["full-bf16"]:
        assert {weight.dtype for name, weight in weights.items() if "layers" in name} >= {torch.bfloat16}
        assert weights["model.embed_tokens.weight"].dtype == torch.bfloat16
        assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    if "--lora_enable" in more:
        projector = torch.load(output / "non_lora_trainables.bin", weights_only=True)
        assert {weight.dtype for name, weight in projector.items() if "mm_projector" in name} == {half}


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
def test_the_first_step_under_deepspeed(stage, lora, trained, zero, tmp_path):
    content = json.loads(Path(zero(f"zero{stage or 2}")).read_text())
    content["zero_optimization"]["stage"] = stage
    config = tmp_path / "zero.json"
    config.write_text(json.dumps(content))
    _, seen = trained("--bf16", "True", "--deepspeed", str(config), *lora)
    assert_exact(seen["buffers"])


@pytest.mark.parametrize("tuning, part", [("full", ".layers."), ("lora", "mm_projector")])
def test_as_many_weights_move_as_under_zero_2(tuning, part, trained, zero):
    lora = [] if tuning == "full" else LORA
    more = ["--bf16", "True", "--max_steps", STEPS, *lora]
    _, alone = trained(*more)
    _, divided = trained(*more, "--deepspeed", zero("zero2"))
    # ZeRO-2's are compared as they are after rounding, which hides the smallest moves.
    assert share(alone, part) >= share(divided, part) > 0.5


@pytest.mark.parametrize("bits", ["4", "8"])
def test_bits_quantize_the_layers_alone_and_both_stages_train(bits, trained, tiny_checkpoint, tmp_path):
    from vitask_plugin.llava import loading

    first, stage_1 = trained("--bits", bits, "--bf16", "True", *LORA, before=quantized)
    names = json.loads((tmp_path / "seen.json").read_text())
    assert names and all(".layers." in name for name in names)
    first = first.rename(tmp_path / "llava-first")
    earlier = ["--vitask_stage", "2", "--vitask_connector_path", str(first)]
    second, stage_2 = trained("--bits", bits, "--bf16", "True", *LORA, *earlier, before=quantized)
    for seen in (stage_1, stage_2):
        assert_exact(seen["buffers"])
        assert seen["trained"] == {torch.float32}
        assert share(seen, "lora_B") > 0.5 and share(seen, "mm_projector") > 0.5
    connector = [count for name, (count, _) in stage_1["moved"].items() if "vitask_connector" in name]
    assert connector and all(connector)
    # In the base's own dtype, whatever the adapter was trained on.
    weights = loading.load(second, base=tiny_checkpoint).model.state_dict()
    base = load_file(tiny_checkpoint / "model.safetensors")
    adapted = [name for name in weights if ".layers." in name and name.endswith("proj.weight") and "tower" not in name]
    assert len(adapted) == len(names) and all((weights[name] != base[name]).any() for name in adapted)
    projector = torch.load(second / "non_lora_trainables.bin", weights_only=True)
    projector = {name.removeprefix("base_model.model."): w for name, w in projector.items() if "mm_projector" in name}
    assert projector and all(torch.equal(weights[name], weight.float()) for name, weight in projector.items())
    stored = load_file(second / "vitask_connector.safetensors")
    assert all(torch.equal(weights[f"vitask_connector.{name}"], weight.float()) for name, weight in stored.items())


def test_a_run_resumes_from_float32_weights(trained, tmp_path):
    saving = ["--bf16", "True", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    output, _ = trained(*saving)
    whole = load_file(output / "model.safetensors")
    middle = load_file(output / "checkpoint-2" / "model.safetensors")
    assert middle["model.embed_tokens.weight"].dtype == torch.float32
    shutil.rmtree(output / "checkpoint-4")
    again, _ = trained(*saving)
    resumed = load_file(again / "model.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_a_loaded_checkpoint_answers_as_stock_loading_does(dtype, tiny_checkpoint):
    from vitask_plugin.llava import compat, loading

    compat.prepare()
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    ours = loading.load(tiny_checkpoint, dtype=dtype).model
    stock = LlavaLlamaForCausalLM.from_pretrained(tiny_checkpoint, torch_dtype=dtype).eval()
    ids = torch.randint(3, stock.config.vocab_size, (1, 1200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, stock(input_ids=ids).logits)
    # A cast after loading does not round either; in float32 the same numbers as before.
    tables = dict(ours.to(torch.float32).half().named_buffers())
    assert tables["model.rotary_emb.inv_freq"].dtype == torch.float32
