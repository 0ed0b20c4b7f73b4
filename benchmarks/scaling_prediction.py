"""The tables that `scaling.py --predict` prints: which configuration fits, what a rank sends, what it holds.

Everything is computed from the formulas in `vitask_plugin.deepspeed` on the parameters of the real models; nothing is
measured here.
"""

from collections.abc import Iterator

from rich.table import Table

from vitask_plugin.deepspeed import communication
from vitask_plugin.deepspeed.configs import NAMES, read_zero
from vitask_plugin.deepspeed.memory import BRANCHES, GIB, Memory, Step, memory_of
from vitask_plugin.estimate_memory import first_that_fits
from vitask_plugin.llava.sizes import SHAPES, Sizes, sizes_of

LORA_RANK = 128  # of LLaVA's own script
GPUS_PER_NODE = 8
CHOICE_GPUS = (1, 4, 8, 16)
CHOICE_CARDS = (24, 40, 80)
SCALING_GPUS = (8, 16, 32, 64)


def tunings() -> Iterator[tuple[str, str, Sizes, bool]]:
    """(model, words, parameters, with LoRA?) of every model, fully fine-tuned and with LoRA."""
    for model in SHAPES:
        yield model, "full", sizes_of(model), False
        yield model, f"LoRA {LORA_RANK}", sizes_of(model, LORA_RANK), True


def memory(sizes: Sizes, config: str, gpus: int, *, lora: bool, packed: bool = True) -> Memory:
    """Of one rank among `gpus`, eight to a node."""
    nodes = max(1, gpus // GPUS_PER_NODE)
    return memory_of(sizes, read_zero(config), Step(packed=packed), ranks=gpus, nodes=nodes, lora=lora)


def sent(sizes: Sizes, stage: int, gpus: int, *, lora: bool, forwards: int) -> float:
    """Bytes that a rank sends in a step without accumulation, with gradient checkpointing."""
    if stage == 2:
        return communication.zero2(sizes.trained, gpus)
    times = communication.gathers(lora=lora, gradient_checkpointing=True)
    gathered = sizes.gathered(10 * sizes.config.hidden_size)  # the threshold that the Trainer sets for "auto"
    return communication.zero3(*gathered, sizes.trained, gpus, times=times, forwards=forwards)


def choice_table() -> Table:
    """The first of `NAMES` that fits, by card and number of GPUs."""
    table = _table(
        "The first configuration that fits; where it offloads, with the GiB it takes of a node's host memory",
        "card",
        CHOICE_GPUS,
    )
    for model, words, sizes, lora in tunings():
        for card in CHOICE_CARDS:
            cells = []
            for gpus in CHOICE_GPUS:
                memories = {config: memory(sizes, config, gpus, lora=lora) for config in NAMES}
                name = first_that_fits(memories.items(), card)
                host = memories[name].host if name in memories else 0
                cells.append(f"{name}, {host / GIB:.0f}" if host else name)
            table.add_row(model, words, f"{card} GB", *cells)
        table.add_section()
    return table


def communication_table() -> Table:
    """GB that a rank sends in a step, packed and branch by branch."""
    table = _table("GB sent per rank and step, packed / branch by branch", "stage", SCALING_GPUS)
    for model, words, sizes, lora in tunings():
        for stage in (2, 3):
            cells = []
            for gpus in SCALING_GPUS:
                packed, branches = (
                    sent(sizes, stage, gpus, lora=lora, forwards=forwards) for forwards in (1, BRANCHES)
                )
                cells.append(f"{packed / 1e9:.1f} / {branches / 1e9:.1f}")
            table.add_row(model, words, f"ZeRO-{stage}", *cells)
        table.add_section()
    return table


def memory_table() -> Table:
    """GiB of a rank at its peak, packed and branch by branch."""
    table = _table("GiB per rank at the peak, packed / branch by branch", "config", SCALING_GPUS)
    for model, words, sizes, lora in tunings():
        for config in NAMES:
            cells = []
            for gpus in SCALING_GPUS:
                peaks = (memory(sizes, config, gpus, lora=lora, packed=packed).peak for packed in (True, False))
                cells.append(" / ".join(f"{peak / GIB:.1f}" for peak in peaks))
            table.add_row(model, words, config, *cells)
        table.add_section()
    return table


def _table(title: str, third: str, gpus: tuple[int, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("model", "tuning", third):
        table.add_column(column, no_wrap=True)
    for count in gpus:
        table.add_column(f"{count} GPU" + "s" * (count > 1), justify="right", no_wrap=True)
    return table


TABLES = {"choice": choice_table, "communication": communication_table, "memory": memory_table}
