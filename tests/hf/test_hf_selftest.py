"""Before the first step: which engine a model gets, what is said of it, and which model is refused."""

import pytest
import torch
from hf_models import Tiny
from hf_runs import LORA, history, vitask

from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.train import train
from vitask_plugin.training import selftest

FP32 = torch.float32


def chosen(asked: str, packed: float, branches: float, dtype=FP32) -> tuple[str, str, list[str]]:
    tried = []

    def differs(engine: str) -> float:
        tried.append(engine)
        return {"packed": packed, "branches": branches}[engine]

    return *selftest.choose(asked, "a/model", differs, dtype), tried


def test_packed_where_it_is_right():
    engine, line, tried = chosen("auto", 2e-6, 1.0)
    assert (engine, tried) == ("packed", ["packed"])
    assert line == "engine: packed, 2.0e-06 of the logits' size from stock forwards of one branch each"


def test_branches_where_a_shared_prefix_is_wrong():
    engine, line, tried = chosen("auto", 0.15, 2e-6)
    assert (engine, tried) == ("branches", ["packed", "branches"])
    assert "branches, 2.0e-06 of" in line and "a shared prefix would differ by 1.5e-01" in line and "'a/model'" in line


@pytest.mark.parametrize(
    ("asked", "figures"), [("auto", "packed 1.5e-01, branches 2.0e-01"), ("packed", "packed 1.5e-01 ")]
)
def test_refused_where_nothing_is_right(asked, figures):
    with pytest.raises(VITaskError, match=f"--vitask_engine {asked} would not train 'a/model'.*{figures}"):
        chosen(asked, 0.15, 0.2)


def test_what_is_no_number_is_no_agreement():
    assert chosen("auto", float("nan"), 1e-6)[0] == "branches"
    with pytest.raises(VITaskError):
        chosen("auto", float("nan"), float("inf"))


def test_bounds():
    assert selftest.bound(FP32) == 1e-4
    assert selftest.bound(torch.bfloat16) == 0.125 and selftest.bound(torch.float16) == 16 * 2**-10
    rows = torch.tensor([[3.0, -4.0]])
    assert selftest.difference(rows + torch.tensor([0.0, 0.5]), rows) == pytest.approx(0.5 / 2**0.5 / 12.5**0.5)
    assert selftest.difference(rows * torch.tensor([1.0, float("nan")]), rows) == float("inf")


# Real models


@pytest.fixture
def start(tiny_hf, sized_mixture, sized_mixture_features, tmp_path, capfd):
    """Trains one step of a family in this process; what was said."""

    def run(family: str, *flags: str) -> str:
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        tiny: Tiny = tiny_hf(family)
        train(vitask(tiny.folder, sized_mixture, sized_mixture_features, tmp_path / "run", "--max_steps", "1", *flags))
        assert len(history(tmp_path / "run")) == 1
        return "".join(capfd.readouterr())

    return run


def test_linear_attention_gets_a_forward_for_each_branch(start):
    said = start("qwen3_5", "--vitask_stage", "1")
    assert "engine: branches, " in said and "a shared prefix would differ by " in said
    assert said.count("engine: ") == 1


def test_linear_attention_is_never_packed_below_float32(start):
    """Where its figure could hide in the rounding."""
    assert "engine: branches, " in start("qwen3_5", "--bf16", "True")


def test_packed_that_was_asked_for_is_refused_with_the_figure(start):
    with pytest.raises(
        VITaskError, match=r"--vitask_engine packed would not train .*qwen3_5.* by packed \d\.\de[-+]\d\d"
    ):
        start("qwen3_5", "--vitask_engine", "packed")


def test_a_window_is_packed(start):
    assert "engine: packed, " in start("mistral_window", *LORA)


def test_an_answer_that_sees_itself_is_refused(start, sized_mixture, tmp_path):
    """Both engines agree with PaliGemma's stock forward, in which every token sees every other."""
    import json

    samples = [one for one in json.loads((sized_mixture / "train.json").read_text()) if "vitask" in one]
    samples = [one for one in samples if len(one["conversations"]) == 2]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(samples))
    with pytest.raises(VITaskError, match=r"in '.*paligemma' an answer's tokens see those behind them .*causal"):
        start("paligemma", "--data_path", str(data))


def test_a_decoder_that_does_not_look_at_the_mask_is_not_packed(start, monkeypatch):
    """It is causal all the same, so a forward for each branch is right."""
    from transformers.models.llama import modeling_llama

    right = modeling_llama.LlamaAttention.forward

    def blind(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        length = hidden_states.shape[1]
        mask = torch.full((length, length), torch.finfo(hidden_states.dtype).min).triu(1)[None, None]
        return right(self, hidden_states, position_embeddings, mask.to(hidden_states), **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", blind)
    assert "engine: branches, " in start("llava")


def test_a_decoder_that_is_no_function_of_its_input_is_refused(start, monkeypatch):
    from transformers.models.llama import modeling_llama

    right = modeling_llama.LlamaModel.forward

    def noisy(self, *args, **kwargs):
        found = right(self, *args, **kwargs)
        if kwargs.get("position_ids") is not None:  # which the stock forward leaves to it
            found.last_hidden_state = found.last_hidden_state + torch.randn_like(found.last_hidden_state)
        return found

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", noisy)
    with pytest.raises(VITaskError, match=r"--vitask_engine auto would not train .* VITask cannot train it"):
        start("llava")


@pytest.mark.parametrize("ep", ["text", "learned", "none"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_every_kind_of_exemplar_is_packed(family, ep, start, sized_mixture_features):
    tsm = ("--vitask_tsm", str(sized_mixture_features.parent / "tsm"))
    assert "engine: packed, " in start(family, "--vitask_ep", ep, "--vitask_stage", "1", *tsm)
