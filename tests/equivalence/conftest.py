"""Each run of the class is made once, when the first test asks for it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import hf_runs
import pytest
from cases import Case
from mixture import flags
from ranks import launch


@dataclass(frozen=True)
class Run:
    """A finished run: the checkpoint, what each rank's `witness` saw, and how far weights moved."""

    output: Path
    ranks: list[dict]
    moves: Path


@pytest.fixture(scope="session")
def command(request, tiny_llava, zero) -> Callable[..., list[str]]:
    """(parallel, output, flags...) to a command line; an earlier flag is overruled by a later one."""

    def make(parallel: str, output: Path, *more: str, host: str = "llava") -> list[str]:
        deepspeed = ["--deepspeed", zero(parallel)] if parallel.startswith("zero") else []
        if host == "hf":
            model = request.getfixturevalue("tiny_hf")("qwen3_vl").folder
            data, features = map(request.getfixturevalue, ("sized_mixture", "sized_mixture_features"))
            return hf_runs.vitask(model, data, features, output, *deepspeed, *more)
        mixture, mixture_features = map(request.getfixturevalue, ("mixture", "mixture_features"))
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
            output = root / f"{case.host}-{case.tuning}-{case}"
            more = [*case.flags, *(case.start(run(case.earlier).output) if case.stage == 2 else [])]
            ended = launch(
                case.processes,
                command(case.parallel, output, *more, host=case.host),
                root / f"logs-{case}",
                host=case.host,
            )
            assert ended.statuses == [0] * case.processes, ended.text
            made[case] = Run(
                output,
                [json.loads(log.with_suffix(".json").read_text()) for log in ended.logs],
                ended.logs[0].with_suffix(".pt"),
            )
        return made[case]

    return run
