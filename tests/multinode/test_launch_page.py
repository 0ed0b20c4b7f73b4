"""docs/launch.md: what is marked as tested is run; the other templates are read by their launcher or use stand-ins."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from string import Template

import pytest
from curves import assert_identical
from page import DOCS, commands, environment

STAND_INS = Path(__file__).parent / "slurm"
TESTED = {
    "one-host-torchrun",
    "one-host-deepspeed",
    "nodes-torchrun",
    "nodes-deepspeed",
    "nodes-torchrun-patched",
    "nodes-deepspeed-patched",
}


def test_what_is_marked_as_tested_is_tested():
    assert set(commands("tested")) == TESTED
    marks = re.findall(r"<!-- (\w+): ", (DOCS / "launch.md").read_text())
    assert len(marks) == len(commands("tested")) + len(commands("template"))


def test_the_deepspeed_template_is_what_the_launcher_reads():
    from deepspeed.launcher.runner import parse_args

    (template,) = commands("template").values()
    template = template.replace("\\\n", " ")
    command = shlex.split(Template(template).safe_substitute(MASTER_ADDR="10.77.0.1", MASTER_PORT="29500"))
    assert command[0] == "deepspeed"
    parsed = parse_args([*command[1:-1], "--vitask", "True"])
    assert (parsed.hostfile, parsed.no_ssh, parsed.module) == ("hostfile", False, True)
    assert (parsed.master_addr, parsed.master_port) == ("10.77.0.1", 29500)
    assert (parsed.user_script, parsed.user_args) == ("vitask_plugin.llava.train", ["--vitask", "True"])


@pytest.mark.parametrize(
    ("template", "nodes", "tasks_per_node"), [("slurm.sh", 2, 1), ("slurm_tasks.sh", 1, 2)], ids=["agents", "tasks"]
)
def test_slurm_template(template, nodes, tasks_per_node, work, command, one_host, tmp_path):
    """The template itself, with a stand-in for srun that starts the tasks here, with Slurm's variables."""
    output = tmp_path / "llava-slurm"
    variables = environment(0)
    slurm = {
        "PATH": f"{STAND_INS}{os.pathsep}{variables['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(nodes * tasks_per_node),
        "SLURM_NTASKS_PER_NODE": str(tasks_per_node),
        "SLURM_GPUS_ON_NODE": str(tasks_per_node),
        "SLURM_CPUS_PER_TASK": "1",
    }
    done = subprocess.run(
        ["bash", str(DOCS / template), *command("zero2", output)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=work,
        env={**os.environ, "OMP_NUM_THREADS": "1", **slurm},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_identical(output, one_host("zero2"))
    assert f"vitask: 2 processes on {nodes} node" in done.stderr


def test_slurm_template_ends_with_the_status_of_a_failed_task(work, command, tmp_path):
    slurm = {
        "PATH": f"{STAND_INS}{os.pathsep}{environment(0)['PATH']}",
        **{"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1"},
        **{"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1"},
    }
    line = [*command("zero2", tmp_path / "out"), "--vitask_features", str(tmp_path / "nowhere")]
    done = subprocess.run(
        ["bash", str(DOCS / "slurm_tasks.sh"), *line],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=work,
        env={**os.environ, **slurm},
    )
    assert done.returncode != 0 and "vitask: error: " in done.stderr
