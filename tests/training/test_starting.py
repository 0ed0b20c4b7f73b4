"""What a stage goes on from is the same under ZeRO-3, which has divided the weights by then."""

from curves import Bound, apart
from mixture import LORA, flags
from saved import finish

BOUND = Bound(loss=1e-5, weight=1e-4, mean=1e-8, moved=2e-4)  # as in tests/equivalence


def test_lora_goes_on_from_a_base_that_has_a_projector(
    tmp_path, tiny_llava, tiny_checkpoint, mixture, mixture_features, command
):
    """As LLaVA-1.5 has: its projector is divided already when the earlier stage's is loaded into it."""

    def run(name: str, count: int, *more: str) -> None:
        base = ("--model_name_or_path", str(tiny_checkpoint), "--per_device_train_batch_size", str(8 // count), *LORA)
        finish(count, flags(tiny_llava, mixture, mixture_features, tmp_path / name, *base, *more))

    run("llava-lora-1", 1)
    second = ("--vitask_stage", "2", "--vitask_connector_path", str(tmp_path / "llava-lora-1"))
    run("llava-lora-one", 1, *second)
    run("llava-lora-zero3", 2, *second, "--deepspeed", command.zero("zero3"))
    losses, weight, mean = apart(tmp_path / "llava-lora-zero3", tmp_path / "llava-lora-one")
    assert len(losses) == 5 and max(losses.values()) < BOUND.loss and weight < BOUND.weight and mean < BOUND.mean
