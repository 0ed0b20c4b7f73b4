"""What transformers' Trainer, PEFT and DeepSpeed need beside each other, whatever the host: one named workaround each.

A workaround is made at one of four moments: before anything is imported, on classes, on the class of the training
arguments before they are parsed, or (a host's own) on the names in a training script.
"""

import copy
import functools
import importlib
import importlib.metadata
import os
import socket
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Workaround:
    """One thing that does not work beside some versions of a package.

    `versions` starts at the oldest transformers that this project runs with, 4.57.
    """

    name: str
    symptom: str  # what happens without it
    when: Literal["import", "class", "arguments", "script"]
    apply: Callable[..., None]  # of no argument, of the arguments' class, or of the script's globals
    versions: SpecifierSet
    package: str = "transformers"

    def needed(self, version: str | None = None) -> bool:
        """Is `version` of the package (the installed one, if not given) in the range?"""
        if version is None:
            try:
                version = importlib.metadata.version(self.package)
            except importlib.metadata.PackageNotFoundError:
                return False
        return self.versions.contains(version, prereleases=True)


def registering(found: list[Workaround]) -> Callable:
    """The decorator that adds to `found`: name, symptom, when, versions, package."""

    def workaround(name: str, symptom: str, when: str, versions: str, package: str = "transformers") -> Callable:
        def register(apply: Callable[..., None]) -> Callable[..., None]:
            found.append(Workaround(name, symptom, when, apply, SpecifierSet(versions), package))
            return apply

        return register

    return workaround


TRAINER: list[Workaround] = []
MADE: set[str] = set()  # names of those in force in this process, whichever host made them
_ARGUMENTS_MARK = "__vitask_workarounds__"
trainer = registering(TRAINER)


def prepare(arguments: type) -> None:
    """Makes those that a host without workarounds of its own needs; calling it again changes nothing.

    Args:
        arguments: the class of the training arguments, not parsed yet.
    """
    for one in TRAINER:
        if one.when == "arguments":
            on_arguments(one, arguments)
        elif one.name not in MADE and one.needed():
            one.apply()
            MADE.add(one.name)


def on_arguments(one: Workaround, arguments: type) -> None:
    """Makes a workaround on a class of training arguments, once."""
    made = vars(arguments).get(_ARGUMENTS_MARK, frozenset())
    if one.name not in made and one.needed():
        one.apply(arguments)
        setattr(arguments, _ARGUMENTS_MARK, made | {one.name})


@trainer(
    "cpu-location",
    "RuntimeError on resuming with several CPU processes: don't know how to restore data location (tagged with cpu:0)",
    "import",
    "<5.18",
)
def _cpu_location() -> None:
    import torch

    def restore(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    torch.serialization.register_package(0, lambda storage: None, restore)


@trainer(
    "zero3-adapter",
    "AssertionError under ZeRO-3 with LoRA and --bf16: the adapter is float32",
    "class",
    ">=0.12",
    "peft",
)
def _zero3_adapter() -> None:
    import peft
    from transformers.integrations import is_deepspeed_zero3_enabled

    original = peft.get_peft_model

    @functools.wraps(original)
    def get_peft_model(*args: Any, **kwargs: Any) -> Any:
        if is_deepspeed_zero3_enabled():
            kwargs.setdefault("autocast_adapter_dtype", False)
        return original(*args, **kwargs)

    peft.get_peft_model = get_peft_model


@trainer("warmup-ratio", "ValueError: arguments are not used: --warmup_ratio", "arguments", ">=5.15")
def _warmup_ratio(arguments: type) -> None:
    # A --warmup_steps below 1 is a ratio now.
    alias(arguments, "warmup_steps", "warmup_ratio")


@trainer("gloo", "DeepSpeed on CPUs: every process takes itself for the only one", "arguments", ">=4.57")
def _gloo(arguments: type) -> None:
    def start(args: Any) -> None:
        if args.deepspeed and args.use_cpu and "RANK" in os.environ:
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))

    extend(arguments, before=start)


@trainer(
    "group-timeout",
    "DeepSpeed: --ddp_timeout does not reach the process group that it works with, so a lost node is waited for 30 min",
    "arguments",
    ">=4.57",
)
def _group_timeout(arguments: type) -> None:
    def set_defaults(args: Any) -> None:
        if args.deepspeed:
            # DeepSpeed clones the world's group and names no timeout: torch then takes these.
            groups = importlib.import_module("torch.distributed.distributed_c10d")
            for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
                if getattr(groups, name, None) is not None:
                    setattr(groups, name, timedelta(seconds=args.ddp_timeout))

    extend(arguments, before=set_defaults)


@trainer(
    "no-compiler",
    "DeepSpeed on CPUs compiles a shared-memory all-reduce on first use, which only inference calls: 26 s, or a crash "
    "where no C++ compiler is installed or two processes compile at once",
    "arguments",
    ">=0.19",
    "deepspeed",
)
def _no_compiler(arguments: type) -> None:
    def skip(args: Any) -> None:
        if args.deepspeed and args.use_cpu:
            importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

    extend(arguments, before=skip)


@trainer(
    "no-launcher",
    "ModuleNotFoundError: No module named 'mpi4py': DeepSpeed asks MPI who it is where no launcher has said so",
    "arguments",
    ">=4.57",
)
def _no_launcher(arguments: type) -> None:
    def be_the_only_one(args: Any) -> None:
        if args.deepspeed and "RANK" not in os.environ:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            own = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in own.items()})

    extend(arguments, before=be_the_only_one)


@trainer(
    "deprecated-collectives",
    "FutureWarning: `torch.distributed.reduce_scatter_tensor` is deprecated, some 30 times a step under ZeRO-3",
    "arguments",
    ">=0.19",
    "deepspeed",
)
def _deprecated_collectives(arguments: type) -> None:
    names = "reduce_scatter_tensor|all_gather_into_tensor"
    warnings.filterwarnings("ignore", rf"`torch\.distributed\.({names})` is deprecated", FutureWarning)


def alias(arguments: type, name: str, old: str) -> None:
    """Lets the command line say `--old` for the field `name`; the field of the parent class stays as it is."""
    fields = arguments.__dataclass_fields__
    if old not in fields:
        field = copy.copy(fields[name])
        field.metadata = types.MappingProxyType({**field.metadata, "aliases": [f"--{old}"]})
        fields[name] = field


def extend(
    arguments: type,
    before: Callable[[Any], None] = lambda args: None,
    after: Callable[[Any], None] = lambda args: None,
) -> None:
    """What to do around the moment in which parsed arguments set themselves up; later workarounds come first."""
    original = arguments.__post_init__

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        before(self)
        original(self)
        after(self)

    arguments.__post_init__ = __post_init__
