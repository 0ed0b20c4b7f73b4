"""Every workaround: what upstream does without it, that this is gone with it, and nothing where not needed."""

import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import compat

pytestmark = pytest.mark.compat
SCRIPTS = Path(__file__).parent / "compat"

# Those that need several processes, or DeepSpeed's engine. The first is tested below, "zero3-random" in
# tests/equivalence (ZeRO-3 starts from the weights of the other runs), "group-timeout" in tests/multinode (a host that
# vanishes), the next two in tests/training/test_launch.py, "quantized-loading" in tests/training/test_precision.py.
ELSEWHERE = (
    "no-compiler",
    "zero3-random",
    "group-timeout",
    "no-launcher",
    "deprecated-collectives",
    "quantized-loading",
)
# How each of the others shows without the workaround; "gloo" and "one-writer" have tests of their own below.
SYMPTOMS = {
    "layernorm-list": "ImportError: cannot import name 'ALL_LAYERNORM_LAYERS'",
    "rms-norm-decay": "input_layernorm.weight",
    "cpu-location": "don't know how to restore data location",
    "evaluation-strategy": "not used by the HfArgumentParser: ['--evaluation_strategy'",
    "warmup-ratio": "not used by the HfArgumentParser: ['--warmup_ratio'",
    "tokenizer-argument": "unexpected keyword argument 'tokenizer'",
    "sampler": "_get_train_sampler() takes 1 positional argument but 2 were given",
    "checkpoint-signature": "_save_checkpoint() takes 3 positional arguments but 4 were given",
    "generation-config": "GenerationConfig is invalid",
    "load-dtype": "torch.float16",
    "lora-resume": "another projector",
    "empty-groups": "an empty group",
    "cache-position": "unexpected keyword argument 'cache_position'",
    "cuda-synchronize": "RuntimeError",
    "zero3-projector": "torch.float32",
    "zero3-adapter": "torch.float32",
}
# Outside of the range these still happen, but the Trainer and DeepSpeed no longer mind.
HARMLESS = {"empty-groups", "cpu-location"}
# A run meets these in this order, and each hides the next.
HIDING = {"tokenizer-argument", "sampler", "checkpoint-signature"}


def python(*command: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )


def finished(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_llava, drawn_data) -> Path:
    """What the scripts train on: base/ with a sampling temperature, as Vicuna has it, and base16/ in float16."""
    work = tmp_path_factory.mktemp("compat")
    shutil.copytree(tiny_llava.tower, work / "tower")
    shutil.copytree(drawn_data / "images", work / "images")
    shutil.copytree(tiny_llava.base, work / "base")
    path = work / "base" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.9, "top_p": 0.6}))
    shutil.copytree(work / "base", work / "base16")
    weights = load_file(work / "base" / "model.safetensors")
    halves = {name: weight.half() for name, weight in weights.items()}
    save_file(halves, work / "base16" / "model.safetensors", metadata={"format": "pt"})
    path = work / "base16" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **{name: "float16" for name in ("dtype", "torch_dtype") if name in config}}))
    samples = json.loads((drawn_data / "train.json").read_text())
    words = [{"from": "human", "value": "Are you sure?"}, {"from": "gpt", "value": "Yes."}]
    samples[0]["conversations"] += words
    samples[1] = {"id": "text-only", "conversations": words}
    (work / "train.json").write_text(json.dumps(samples))
    return work


@pytest.fixture(scope="module")
def outcomes(work) -> dict[str, list[str]]:
    finished(python(SCRIPTS / "one_by_one.py", work, work / "outcomes.json"))
    return json.loads((work / "outcomes.json").read_text())


@pytest.mark.parametrize("name", SYMPTOMS)
def test_symptom_and_mend(outcomes, name):
    one = next(one for one in compat.WORKAROUNDS if one.name == name)
    before, after = outcomes[name]
    if name == "cuda-synchronize" and torch.cuda.is_available():
        pytest.skip("shows without a CUDA device only")
    if one.needed():
        assert SYMPTOMS[name] in before
        assert SYMPTOMS[name] not in after
        assert after == "fine" or name in HIDING
    elif name not in HARMLESS:
        assert SYMPTOMS[name] not in before


def test_every_mend_is_tested():
    assert {one.name for one in compat.WORKAROUNDS} == {*SYMPTOMS, "gloo", "one-writer", *ELSEWHERE}


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("layernorm-list", ["4.57.6", "5.0.0", "5.23.0"], ["4.37.2"]),
        ("cpu-location", ["4.57.6", "5.17.0"], ["5.18.0", "5.23.0"]),
        ("cache-position", ["4.57.6", "5.3.0"], ["5.4.0", "5.23.0"]),
        ("empty-groups", ["4.57.6"], ["5.0.0"]),
        ("tokenizer-argument", ["5.0.0", "5.23.0"], ["4.57.6"]),
        ("load-dtype", ["5.0.0", "5.23.0"], ["4.57.6"]),
        ("warmup-ratio", ["5.15.0", "5.23.0"], ["4.57.6", "5.14.0"]),
    ],
)
def test_ranges(name, inside, outside):
    one = next(one for one in compat.WORKAROUNDS if one.name == name)
    assert all(one.needed(version) for version in inside)
    assert not any(one.needed(version) for version in outside)


def upstream_attributes() -> dict[str, object]:
    """What workarounds replace, so that a second workaround on top of the first is seen."""
    import peft
    import transformers.trainer
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from llava.model.llava_arch import LlavaMetaModel
    from llava.train.llava_trainer import LLaVATrainer

    return {
        **{f"trainer {name}": value for name, value in vars(LLaVATrainer).items()},
        **{f"model {name}": value for name, value in vars(LlavaLlamaForCausalLM).items()},
        **{f"arch {name}": value for name, value in vars(LlavaMetaModel).items()},
        "layers": list(transformers.trainer.ALL_LAYERNORM_LAYERS),
        "peft": peft.get_peft_model,
        "locations": len(torch.serialization._package_registry),
    }


def test_prepare_again_changes_nothing():
    names = compat.prepare()
    assert names == [one.name for one in compat.WORKAROUNDS if one.when in ("import", "class") and one.needed()]
    before = upstream_attributes()
    assert compat.prepare() == names
    assert upstream_attributes() == before


def test_nothing_is_made_outside_of_the_range():
    compat.prepare()
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    patched = {
        "cache-position": hasattr(LlavaLlamaForCausalLM.forward, "__wrapped__"),
    }
    assert patched == {one.name: one.needed() for one in compat.WORKAROUNDS if one.name in patched}


def test_script_mended_once_and_in_any_module_object():
    """Under a launcher the script runs as `__main__`, beside `llava.train.train` or instead of it."""
    compat.prepare()
    namespace = runpy.run_module("llava.train.train", run_name="launched")
    names = compat.patch_script(namespace)
    assert names == [one.name for one in compat.WORKAROUNDS if one.when in ("script", "arguments") and one.needed()]
    arguments = namespace["TrainingArguments"]
    before = (arguments.__post_init__, namespace["safe_save_model_for_hf_trainer"])
    assert compat.patch_script(namespace) == names
    assert (arguments.__post_init__, namespace["safe_save_model_for_hf_trainer"]) == before
    import transformers

    parser = transformers.HfArgumentParser(arguments)
    flags = ["--output_dir", "unused", "--evaluation_strategy", "steps", "--eval_steps", "7", "--warmup_ratio", "0.03"]
    (parsed,) = parser.parse_args_into_dataclasses([*flags, "--use_cpu", "True", "--report_to", "none"])
    assert (parsed.eval_strategy, parsed.eval_steps, parsed.get_warmup_steps(1000)) == ("steps", 7, 30)
    # The parent class is everybody's, and stays as it was.
    with pytest.raises(ValueError, match="evaluation_strategy"):
        transformers.HfArgumentParser(transformers.TrainingArguments).parse_args_into_dataclasses(flags[:4])


FAILING_IMPORTS = """
import importlib.util, transformers.generation.utils, transformers.models.llama.modeling_llama, transformers.trainer
from vitask_plugin.llava import compat

def show():
    try:
        compat.prepare()
    except Exception as error:
        print(repr(error))

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "llava" else find(name, *rest)
show()
importlib.util.find_spec = find
for module, name in ((transformers.generation.utils, "GenerateOutput"), (transformers.trainer, "has_length")):
    kept = getattr(module, name)
    delattr(module, name)
    show()
    setattr(module, name, kept)
"""


def test_failing_import_shows_its_cause():
    """`llava.model` swallows it, and then fails on a name that it lacks."""
    absent, model, trainer = finished(python("-c", FAILING_IMPORTS)).stdout.strip().splitlines()[-3:]
    assert all("VITaskError" in answer for answer in (absent, model, trainer))
    assert "pip install --no-deps llava-torch" in absent
    assert "cannot import name 'GenerateOutput' from" in model
    assert "cannot import name 'has_length' from" in trainer


@pytest.fixture(scope="module")
def trained(work) -> Path:
    finished(python(SCRIPTS / "train_and_load.py", "whole", work))
    finished(python(SCRIPTS / "train_and_load.py", "rest", work))
    return work


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found = load_file(next(directory.glob("*model.safetensors")))
    if (directory / "non_lora_trainables.bin").exists():
        found |= torch.load(directory / "non_lora_trainables.bin", weights_only=True)
    return found


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_run_resumes_to_the_same_weights(trained, kind):
    whole, resumed = weights(trained / f"llava-{kind}"), weights(trained / f"llava-{kind}-resumed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    state = json.loads((trained / f"llava-{kind}" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    halfway = weights(trained / f"llava-{kind}" / "checkpoint-2")
    assert any(not torch.equal(halfway[name], whole[name]) for name in whole if "mm_projector" in name)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_stock_llava_loads_and_generates(trained, kind):
    generated, expected = json.loads((trained / "answers.json").read_text())[kind]
    assert generated == expected


def test_resuming_without_the_other_trainables_is_refused(trained):
    answer = json.loads((trained / "answers.json").read_text())["refused"]
    assert "mm_projector" in answer
    assert "would start anew" in answer


@pytest.mark.parametrize("damage", [b"", b"0", b"garbage", "cut short"])
def test_resuming_from_damaged_other_trainables_is_refused(damage, tmp_path):
    compat.prepare()
    from llava.train.llava_trainer import LLaVATrainer
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments

    network = torch.nn.ModuleDict({"layer": torch.nn.Linear(2, 2), "mm_projector": torch.nn.Linear(2, 2)})
    model = get_peft_model(network, LoraConfig(target_modules=["layer"], modules_to_save=["mm_projector"]))
    trainer = LLaVATrainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    trainer._save(str(tmp_path))
    path = tmp_path / compat.NON_LORA_FILE
    path.write_bytes(path.read_bytes()[:-100] if damage == "cut short" else damage)
    with pytest.raises(VITaskError, match=rf"{compat.NON_LORA_FILE}' cannot be read \(.+\)") as caught:
        trainer._load_from_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)


def two_nodes(mode: str, work: Path) -> list[dict]:
    """Starts two processes as two machines would, on one disk; returns what each printed last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / "two_nodes.py"), mode, str(work)],
            env={**os.environ, **common, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ended = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (printed, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, printed[-2000:] + errors[-4000:]
    return [json.loads(printed.splitlines()[-1]) for printed, _ in ended]


def test_two_nodes_have_one_writer_and_resume(work):
    first, second = two_nodes("ddp", work)
    # Upstream writes where this is 0 or -1.
    assert {first["unpatched"]["local_rank"], second["unpatched"]["local_rank"]} <= {0, -1}
    whole, resumed = work / "llava-two-lora", work / "llava-two-lora-resumed"
    for output in (whole, resumed):
        assert first["written"].count(str(output / compat.NON_LORA_FILE)) == 1
        assert str(output / compat.NON_LORA_FILE) not in second["written"]
    assert weights(whole).keys() == weights(resumed).keys()
    assert all(torch.equal(weight, weights(resumed)[name]) for name, weight in weights(whole).items())


def test_two_nodes_under_zero3(work):
    first, second = two_nodes("zero3", work)
    assert not first["unpatched"]["deepspeed"]
    from deepspeed.comm.torch import TorchBackend

    assert "build_shm_op" in TorchBackend.__init__.__code__.co_names  # else there is nothing left to work around
    assert first["compiled"] == second["compiled"] == []
    lora = str(work / "llava-zero3-lora" / compat.NON_LORA_FILE)
    assert lora in first["written"]
    assert lora not in second["written"]
    for kind in ("lora", "full"):
        projector = [weight for name, weight in weights(work / f"llava-zero3-{kind}").items() if "mm_projector" in name]
        assert projector
        assert all(weight.numel() for weight in projector)
