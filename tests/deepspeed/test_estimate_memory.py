"""Parameter counts against a model that was built, memory and communication against sums by hand, DeepSpeed's estimate
against its functions, and the tables in docs/deepspeed.md against the commands above them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitask_plugin import cli
from vitask_plugin.deepspeed import communication
from vitask_plugin.deepspeed.configs import NAMES, read_zero
from vitask_plugin.deepspeed.memory import GIB, Step, deepspeed_estimate, memory_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava.sizes import Sizes, sizes_of

ROOT = Path(__file__).resolve().parents[2]
STEP = Step(batch=2)


def elements(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@pytest.fixture(scope="module")
def built(tiny_checkpoint: Path):
    """The tiny checkpoint with its weights, as upstream loads it."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(str(tiny_checkpoint))
    model.get_vision_tower().load_model()
    return model


def test_counts_are_those_of_a_built_model(built, tiny_checkpoint: Path) -> None:
    from deepspeed.runtime.zero.stage3 import model_to_params

    sizes = sizes_of(str(tiny_checkpoint))
    tower, projector = built.get_vision_tower(), built.get_model().mm_projector
    llm = elements(built) - elements(tower) - elements(projector)
    assert (sizes.llm, sizes.projector, sizes.tower) == (llm, elements(projector), elements(tower))
    assert sizes.adapters == 0 and sizes.trained == llm + elements(projector)
    assert sizes.total == elements(built) + sizes.connector
    hidden = built.config.hidden_size
    assert sizes.connector == 768 * hidden + hidden + hidden * hidden + hidden
    total, largest = model_to_params(built)
    assert (sizes.total - sizes.connector, sizes.largest_layer) == (total, max(largest, 768 * hidden + hidden))
    layers = elements(built.model.layers) - 2 * hidden * built.config.num_hidden_layers  # without their norms
    assert sizes.gathered(hidden) == (sizes.divided - hidden * (2 * built.config.num_hidden_layers + 1 + 4), layers)


def test_lora_is_counted_as_upstream_adds_it(built, tiny_checkpoint: Path) -> None:
    sizes, full = sizes_of(str(tiny_checkpoint), 8), sizes_of(str(tiny_checkpoint))
    widths = [
        (layer.in_features, layer.out_features)
        for block in built.model.layers
        for layer in block.modules()
        if isinstance(layer, torch.nn.Linear)
    ]
    assert len(widths) == 7 * built.config.num_hidden_layers
    assert sizes.adapters == 8 * sum(map(sum, widths))
    assert (sizes.llm, sizes.trained) == (full.llm, sizes.adapters + sizes.projector)
    assert sizes.divided == full.divided + sizes.adapters and sizes.divided == sum(sizes.numels)


@pytest.mark.parametrize(
    ("model", "llm", "adapters"), [("7b", 6.738e9, 0.320e9), ("13b", 13.016e9, 0.501e9), ("34b", 34.389e9, 0.983e9)]
)
def test_known_sizes(model: str, llm: float, adapters: float) -> None:
    """Vicuna 7B and 13B, Yi-34B; LLaVA's CLIP tower (0.30e9) and projector; LoRA of rank 128."""
    sizes = sizes_of(model, 128)
    assert sizes.llm == pytest.approx(llm, rel=1e-3) and sizes.adapters == pytest.approx(adapters, rel=2e-3)
    assert sizes.tower == pytest.approx(0.3035e9, rel=1e-3)
    hidden, vocabulary = sizes.config.hidden_size, sizes.config.vocab_size
    assert sizes.largest_layer == hidden * vocabulary
    assert sizes.projector == 1024 * hidden + hidden + hidden**2 + hidden


def hand_made(**changes: int) -> Sizes:
    sizes = Sizes(1000, 200, 100, 0, 50, 1200, (900, 100, 200, 100), (900,), 400, sizes_of("7b").config)
    return replace(sizes, **changes)


@pytest.mark.parametrize(
    ("name", "weights", "gathered", "gradients", "optimizer", "stepping", "host"),
    [
        ("zero2", 2 * 1300 + 2 * 50, 0, 2 * 1200 / 8, 12 * 1200 / 8, 4 * 1200 / 8, 0),
        ("zero3", 2 * 1300 / 8 + 2 * 50, 2 * 1300, 2 * 1200 / 8, 12 * 1200 / 8, 4 * 1200 / 8, 0),
        ("zero2_offload", 2 * 1300 + 2 * 50, 0, 0, 0, 0, 18 * 1200 / 2),
        ("zero3_offload", 2 * 50, 2 * 1300, 0, 0, 0, (18 * 1200 + 2 * 1300) / 2),
    ],
)
def test_memory_by_hand(name, weights, gathered, gradients, optimizer, stepping, host) -> None:
    """1300 divided elements, 1200 of them trained, 50 in the tower; 8 ranks on 2 nodes."""
    memory = memory_of(hand_made(), read_zero(name), STEP, ranks=8, nodes=2, lora=False)
    found = (memory.weights, memory.gathered, memory.gradients, memory.optimizer, memory.stepping, memory.host)
    assert found == pytest.approx((weights, gathered, gradients, optimizer, stepping, host))
    assert memory.peak == pytest.approx(weights + gradients + optimizer + max(gathered + memory.activations, stepping))
    assert memory.activations > 0
    frozen = memory_of(hand_made(trained=200), read_zero(name), STEP, ranks=8, nodes=2, lora=True)
    assert (frozen.weights, frozen.gathered) == (memory.weights, memory.gathered)
    assert frozen.optimizer == pytest.approx(memory.optimizer / 6) and frozen.activations > memory.activations


def test_the_peak_is_in_the_optimizers_step_where_that_is_larger() -> None:
    sizes = sizes_of("34b")
    memory = memory_of(sizes, read_zero("zero2"), STEP, ranks=4, lora=False)
    assert memory.stepping > memory.activations
    assert memory.peak == memory.weights + memory.gradients + memory.optimizer + memory.stepping
    card = memory.peak / 0.9 / GIB
    assert memory.fits(card * 1.001) and not memory.fits(card * 0.999)


def test_what_is_gathered_is_limited_by_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 500}}))
    memory = memory_of(hand_made(), read_zero(str(path)), STEP, ranks=2, lora=False)
    assert memory.gathered == 2 * 500
    assert memory_of(hand_made(), read_zero(str(path)), STEP, ranks=1, lora=False).gathered == 0


def test_positions_are_those_of_the_layouts() -> None:
    """Samples that are each other's negatives, in the real layouts, which leave out the last token of a branch."""
    from vitask_plugin.method.branches import LAYOUTS, Continuation, Document

    step = Step(batch=4, prefix=611, continuation=80, answer=6)
    assert step.predicted == 4 * 3 * 6
    labels = torch.full((80,), -100)
    labels[-6:] = 7
    plain = Continuation(torch.arange(80), labels)
    prompted = Continuation(torch.arange(81), torch.cat([labels[:1], labels]))
    negative = replace(plain, shared=74)
    documents = [Document(torch.arange(611), [plain, prompted, negative]) for _ in range(4)]
    assert LAYOUTS["packed"].of(documents).positions == step.positions - 4 * 3
    separate = replace(step, packed=False)
    assert LAYOUTS["branches"].of(documents).positions == separate.positions


def test_activations_are_those_of_the_step() -> None:
    from vitask_plugin.deepspeed.activations import activation_bytes

    sizes = sizes_of("7b")
    for checkpointing in (False, True):
        step = Step(batch=3, gradient_checkpointing=checkpointing)
        memory = memory_of(sizes, read_zero("zero2"), step, ranks=8, lora=False)
        settings = {"dtype": torch.bfloat16, "gradient_checkpointing": checkpointing, "lora": False}
        assert memory.activations == activation_bytes(sizes.config, step.positions, step.predicted, **settings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ranks", "nodes"), [(1, 1), (16, 2)])
def test_deepspeeds_estimate_is_its_own(name: str, ranks: int, nodes: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    sizes = sizes_of("7b", 64)
    offload = "offload" in name
    if name.startswith("zero2"):
        host, gpu = estimate_zero2_model_states_mem_needs(sizes.total, ranks // nodes, nodes, offload)
    else:
        host, gpu, _ = estimate_zero3_model_states_mem_needs(
            sizes.total, sizes.largest_layer, ranks // nodes, nodes, offload, offload
        )
    assert deepspeed_estimate(sizes, read_zero(name), ranks=ranks, nodes=nodes) == (host, gpu)


def test_ours_is_deepspeeds_where_everything_is_trained() -> None:
    """ZeRO-2 without offload: DeepSpeed's 2 + 18 / N bytes, all of it in our peak."""
    sizes = hand_made(llm=10**9, trained=10**9, projector=0, connector=0, tower=0)
    memory = memory_of(sizes, read_zero("zero2"), STEP, ranks=4, lora=False)
    _, gpu = deepspeed_estimate(sizes, read_zero("zero2"), ranks=4)
    assert memory.weights + memory.gradients + memory.optimizer + memory.stepping == gpu


def test_communication_by_hand() -> None:
    """4 ranks: 3/4 of what is gathered or scattered, twice that for an all-reduce; 2 bytes an element."""
    assert communication.ddp(1000, 4) == 2 * 0.75 * 2000
    assert communication.zero2(1000, 4) == 2 * 0.75 * 2000 + 0.75 * 2000
    assert communication.zero2(1000, 4, accumulation=3) == 3 * 2 * 0.75 * 2000 + 0.75 * 2000
    assert communication.zero3(5000, 4000, 1000, 4, times=2) == 0.75 * (2 * 10000 + 2000)
    assert communication.zero3(5000, 4000, 1000, 4, times=2, forwards=3) == 0.75 * (2 * 26000 + 2000)
    assert communication.zero3(5000, 0, 1000, 4, times=3, accumulation=2, element=4) == 2 * 0.75 * (3 * 20000 + 4000)
    for sent in (communication.ddp(9, 1), communication.zero2(9, 1), communication.zero3(9, 9, 9, 1, times=3)):
        assert sent == 0
    found = {communication.gathers(lora=lora, gradient_checkpointing=check) for lora, check in ((0, 0), (0, 1), (1, 0))}
    assert found == {2} and communication.gathers(lora=True, gradient_checkpointing=True) == 3


def figures(text: str, config: str) -> list[str]:
    """Cells of the row of `config`."""
    row = next(line for line in text.splitlines() if line.startswith(f"│ {config} "))
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_the_command_prints_the_estimate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 1}}')
    words = ["--model", "13b", "--lora-r", "64", "--gpus-per-node", "4", "--nodes", "2", "--batch-size", "2"]
    configs = ["zero2", "zero3_offload", str(own)]
    assert cli.main(["estimate-memory", *words, "--no-gradient-checkpointing", "--config", *configs]) == 0
    shown = capsys.readouterr().out
    sizes, step = sizes_of("13b", 64), Step(batch=2, gradient_checkpointing=False)
    assert f"{sizes.trained / 1e9:.3f} of them trained" in " ".join(shown.split())
    for name in configs[:2]:
        memory = memory_of(sizes, read_zero(name), step, ranks=8, nodes=2, lora=True)
        host, gpu = deepspeed_estimate(sizes, read_zero(name), ranks=8, nodes=2)
        parts = (memory.weights, memory.gathered, memory.gradients, memory.optimizer, memory.activations, memory.peak)
        expected = [f"{size / GIB:.1f}" for size in (*parts, memory.host, gpu, host)]
        assert figures(shown, name)[1:-1] == expected
        assert memory.fits(float(figures(shown, name)[-1].removesuffix(" GB")))
    assert "n/a" in shown  # DeepSpeed has no estimator below ZeRO-2
    assert f"{step.positions} positions" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "9b"], "neither one of 7b, 13b, 34b nor a folder"),
        (["--model", "7b", "--lora-r", "0"], "at least 1"),
        (["--model", "7b", "--nodes", "0"], "must be at least 1"),
        (["--model", "7b", "--batch-size", "0"], "must be at least 1"),
        (["--model", "7b", "--tokens", "600", "5", "9"], "part of the continuation"),
        (["--model", "7b", "--config", "zero9"], "neither a file nor one of"),
    ],
)
def test_bad_input_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate-memory", *words]) == 1
    shown = capsys.readouterr().err
    assert sentence in shown and shown.count("\n") == 1


def test_a_model_that_cannot_be_read(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(VITaskError, match="is not readable JSON"):
        sizes_of(str(tmp_path))
    for other in ({"model_type": "gpt2"}, {"model_type": "llama", "hidden_size": 8}, []):
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(VITaskError, match="is of no Llama"):
            sizes_of(str(tmp_path))
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mm_vision_tower": "openai/absent"}))
    with pytest.raises(VITaskError, match="'openai/absent', which is no folder"):
        sizes_of(str(tmp_path) + "/")


# The page -------------------------------------------------------------------------------------------------------------


def blocks() -> list[tuple[list[str], str]]:
    """(words of the command, what stands below it) of each block of docs/deepspeed.md that opens with `$ `."""
    text = (ROOT / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    found = re.findall(r"^```\n\$ ([^\n]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [(command.split(), body) for command, body in found]


@pytest.mark.parametrize(("words", "body"), blocks(), ids=lambda value: " ".join(value) if type(value) is list else "")
def test_the_page_holds_what_its_commands_print(
    words: list[str], body: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("COLUMNS", "80")  # the width of the page's tables does not follow the terminal's
    if words[0] == "vitask":
        assert cli.main(words[1:]) == 0
    else:
        import scaling

        assert words[:2] == ["python", "benchmarks/scaling.py"]
        scaling.main(words[2:])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if "real_accelerator" not in line]
    assert printed == body.splitlines()


def test_the_page_has_all_its_blocks() -> None:
    commands = [" ".join(words) for words, _ in blocks()]
    for table in ("choice", "communication", "memory"):
        assert f"python benchmarks/scaling.py --predict {table}" in commands
    assert sum(command.startswith("vitask estimate-memory") for command in commands) >= 2
