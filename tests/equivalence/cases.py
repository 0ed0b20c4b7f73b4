"""The runs that must give one curve: a table, and what makes a command line of a row."""

import itertools
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from curves import Bound
from mixture import LORA


@dataclass(frozen=True)
class Case:
    """One way to train on the same 8 samples a step.

    Attributes:
        parallel: one process, or two under DDP or a ZeRO stage.
        split: a process's share of a step in one batch (`whole`), or in two (`accumulated`).
        host: whose model: LLaVA 1.5's own code, or transformers' Qwen3-VL.
    """

    parallel: Literal["one", "ddp", "zero1", "zero2", "zero3"]
    stage: Literal[1, 2]
    tuning: Literal["full", "lora"]
    split: Literal["whole", "accumulated"]
    engine: Literal["packed", "branches"]
    checkpointing: bool
    precision: Literal["fp32", "bf16"]
    host: Literal["llava", "hf"] = "llava"

    def __str__(self) -> str:
        checkpointing = "checkpointing" if self.checkpointing else "kept"
        return "-".join(
            [
                *(self.host, self.parallel, f"stage{self.stage}", self.tuning),
                *(self.split, self.engine, checkpointing, self.precision),
            ]
        )

    @property
    def reference(self) -> "Case":
        """The same stage, tuning, precision and host in the plainest way: one process, one batch of 8."""
        return Case("one", self.stage, self.tuning, "whole", "packed", False, self.precision, self.host)

    @property
    def earlier(self) -> "Case":
        """The stage 1 that stage 2 resumes from: of one process, in float32."""
        return Case("one", 1, self.tuning, "whole", "packed", False, "fp32", self.host)

    @property
    def processes(self) -> int:
        return 1 if self.parallel == "one" else 2

    @property
    def flags(self) -> list[str]:
        """Without --deepspeed and what an earlier stage left (see `start`)."""
        parts = 2 if self.split == "accumulated" else 1
        return [
            *("--per_device_train_batch_size", str(8 // self.processes // parts)),
            *("--gradient_accumulation_steps", str(parts)),
            *("--vitask_stage", str(self.stage), "--vitask_engine", self.engine),
            *("--gradient_checkpointing", str(self.checkpointing), "--bf16", str(self.precision == "bf16")),
            # The paper's loss, whose CRT term alone moves far in stage 2.
            *("--vitask_crt_weight", "1"),
            *(LORA if self.tuning == "lora" else ()),
            # LLaVA's own rate, at which most updates are smaller than the distance between two bfloat16 numbers.
            *(("--learning_rate", "2e-5") if self.precision == "bf16" else ()),
        ]

    def start(self, earlier: Path) -> list[str]:
        """What stage 2 resumes from.

        Args:
            earlier: output of `self.earlier`.
        """
        model = ["--model_name_or_path", str(earlier)] if self.tuning == "full" else []
        return ["--vitask_connector_path", str(earlier), *model]

    @property
    def bound(self) -> Bound:
        return (HF_BF16 if self.host == "hf" else BF16) if self.precision == "bf16" else FP32


# Found by a search for the smallest table in which every two values of two columns meet wherever they can (11 rows;
# `test_every_two_values_meet` checks it), then float32 rows for pairs that matter most and met in bfloat16 alone.
CASES = [
    Case("one", 1, "lora", "accumulated", "packed", False, "bf16"),
    Case("one", 2, "full", "whole", "branches", True, "fp32"),
    Case("ddp", 1, "lora", "accumulated", "branches", True, "fp32"),
    Case("ddp", 2, "full", "accumulated", "branches", False, "fp32"),
    Case("ddp", 2, "full", "whole", "packed", True, "bf16"),
    Case("zero1", 1, "full", "whole", "branches", True, "fp32"),
    Case("zero1", 2, "lora", "accumulated", "packed", False, "bf16"),
    Case("zero2", 1, "full", "whole", "packed", False, "fp32"),
    Case("zero2", 2, "lora", "accumulated", "branches", True, "bf16"),
    Case("zero3", 1, "lora", "whole", "packed", True, "fp32"),
    Case("zero3", 2, "full", "accumulated", "packed", False, "bf16"),
    # More in float32, where a difference shows.
    Case("one", 2, "lora", "accumulated", "packed", False, "fp32"),
    Case("ddp", 2, "full", "whole", "packed", False, "fp32"),
    Case("zero2", 2, "lora", "whole", "packed", True, "fp32"),
    Case("zero3", 1, "lora", "whole", "packed", False, "fp32"),
    Case("zero3", 2, "full", "accumulated", "packed", True, "fp32"),
    # The other host, with every value of every column.
    Case("one", 2, "lora", "accumulated", "branches", True, "fp32", "hf"),
    Case("ddp", 2, "full", "accumulated", "packed", False, "fp32", "hf"),
    Case("zero1", 1, "lora", "whole", "branches", False, "fp32", "hf"),
    Case("zero2", 1, "full", "whole", "packed", True, "bf16", "hf"),
    Case("zero2", 2, "lora", "whole", "packed", False, "fp32", "hf"),
    Case("zero3", 2, "lora", "whole", "packed", True, "fp32", "hf"),
    Case("zero3", 1, "full", "accumulated", "packed", False, "fp32", "hf"),
]

# Sums of the same numbers in another order. Measured: losses up to 3e-6, weights 2e-5, mean 3e-9, moved 5e-5.
FP32 = Bound(loss=1e-5, weight=1e-4, mean=1e-8, moved=2e-4)
# 16-bit sums in another order, and what DeepSpeed writes is rounded. Measured: 1e-3, 5e-4, 6e-5, 0.03; with bfloat16
# weights that take the steps themselves, ZeRO-3 and one process moved 1.9 apart.
BF16 = Bound(loss=5e-3, weight=2e-3, mean=1.5e-4, moved=0.06)
# Its losses start higher and its weights are larger, and with them what rounding is: measured 6e-3, 2.7e-3, 0.064.
HF_BF16 = replace(BF16, loss=1e-2, weight=5e-3, moved=0.12)


def possible() -> Iterator[Case]:
    """Every case there can be: ZeRO-3 refuses separate branches, and a reference is not compared with itself."""
    values = [("one", "ddp", "zero1", "zero2", "zero3"), (1, 2), ("full", "lora"), ("whole", "accumulated")]
    for row in itertools.product(*values, ("packed", "branches"), (False, True), ("fp32", "bf16"), ("llava", "hf")):
        case = Case(*row)
        if (case.parallel, case.engine) != ("zero3", "branches") and case != case.reference:
            yield case


def pairs(cases: list[Case]) -> set[tuple[str, object, str, object]]:
    """(column, value, column, value) for every two columns of each case."""
    names = [field.name for field in fields(Case)]
    rows = [list(zip(names, astuple(case), strict=True)) for case in cases]
    return {(*first, *second) for row in rows for first, second in itertools.combinations(row, 2)}
