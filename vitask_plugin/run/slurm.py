"""The Slurm job of a recipe: `vitask run` on the first node, which starts the training commands on all by srun."""

import shlex
from pathlib import Path

from vitask_plugin.run.judging_stages import interpreter_folder
from vitask_plugin.run.recipe import Recipe

_TEMPLATE = """#!/usr/bin/env bash
# Submit with:  sbatch {name}   (written by `vitask run`; the same job goes on where an earlier one ended)
#SBATCH --job-name=vitask
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{gpus}#SBATCH --cpus-per-task={cpus}
#SBATCH --time={hours}:00:00
set -euo pipefail
cd {folder}
export PATH={programs}:"$PATH"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs on one node have two ports
export MASTER_ADDR MASTER_PORT
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun no longer takes over by itself

{command}
"""


def job(recipe: Recipe, name: str, words: list[str]) -> str:
    """The file's text.

    Args:
        name: of the file. words: of the `vitask run` that it starts.
    """
    launch = recipe.launch
    return _TEMPLATE.format(
        name=shlex.quote(name),
        nodes=launch.nodes,
        gpus="" if launch.device == "cpu" else f"#SBATCH --gpus-per-node={launch.processes}\n",
        cpus=launch.cpus_per_process * launch.processes,
        hours=launch.hours,
        folder=shlex.quote(str(Path.cwd())),
        programs=shlex.quote(interpreter_folder()),
        command=shlex.join(["vitask", "run", *words]),
    )
