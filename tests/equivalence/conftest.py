"""Each run of the class is made once, when the first test asks for it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cases import Case
from mixture import flags
from ranks import launch


@dataclass(frozen=True)
class Run:
    """A finished run: the checkpoint, what each rank's `witness` saw, and the trained weights that rank 0's wrote."""

    output: Path
    ranks: list[dict]
    trained: Path


@pytest.fixture(scope="session")
def command(tiny_llava, mixture, mixture_features, zero) -> Callable[..., list[str]]:
    """(parallel, output, flags...) to a command line; an earlier flag is overruled by a later one."""

    def make(parallel: str, output: Path, *more: str) -> list[str]:
        deepspeed = ["--deepspeed", zero(parallel)] if parallel.startswith("zero") else []
        return flags(tiny_llava, mixture, mixture_features, output, *deepspeed, *more)

    return make


@pytest.fixture(scope="session")
def runs(tmp_path_factory, command) -> Callable[[Case], Run]:
    """A case to its finished run."""
    root = tmp_path_factory.mktemp("equivalence")
    made: dict[Case, Run] = {}

    def run(case: Case) -> Run:
        if case not in made:
            # Its name tells stock LLaVA what it is.
            output = root / f"llava-{case.tuning}-{case}"
            more = [*case.flags, *(case.start(run(case.earlier).output) if case.stage == 2 else [])]
            ended = launch(case.processes, command(case.parallel, output, *more), root / f"logs-{case}")
            assert ended.statuses == [0] * case.processes, ended.text
            made[case] = Run(
                output,
                [json.loads(log.with_suffix(".json").read_text()) for log in ended.logs],
                ended.logs[0].with_suffix(".pt"),
            )
        return made[case]

    return run
