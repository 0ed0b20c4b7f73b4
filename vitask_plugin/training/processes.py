"""The processes of a run before the first step and after the last: started alike, lost, interrupted, ended."""

import atexit
import json
import os
import platform
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from traceback import walk_tb
from typing import Any, NoReturn

import torch.distributed as dist

from vitask_plugin.deepspeed.reading import check_accepted, configuration, zero_section
from vitask_plugin.errors import VITaskError, causes
from vitask_plugin.record.checkpoint import versions
from vitask_plugin.training import flags, own_optimizer
from vitask_plugin.training.agreement import gathered, is_first_of_node, place, say, together
from vitask_plugin.training.peers import EveryRankError
from vitask_plugin.training.zero import check_gathers, zero_stage

# What may differ between nodes: where things lie, and what the launcher adds. What samples are made of is compared by
# content, see `check_data`; weights come from rank 0 whatever the others read.
LOCAL_FLAGS = frozenset(
    {
        "local_rank",
        "output_dir",
        "logging_dir",
        "cache_dir",
        "data_path",
        "image_folder",
        "model_name_or_path",
        "vitask_tsm",
        "vitask_features",
        "vitask_connector_path",
        "vitask_eval_data",
    }
)
# How a closed connection or one that does not answer shows: gloo raises a bare RuntimeError.
CONNECTION_ERRORS = (
    *("gloo/transport", "Gloo connect", "Connection closed by peer", "Connection reset by peer"),
    *("remote process exited", "socketStartConnect", "Watchdog caught collective operation timeout"),
)
# Modules that look in the environment for the other processes, while the training arguments set themselves up.
_RENDEZVOUS = ("torch.distributed.rendezvous", "accelerate.state", "deepspeed.comm.comm")


# Before the first step -----------------------------------------------------------------------------------------------


@contextmanager
def checked(
    arguments: type, argv: Sequence[str], check_paths: Callable[[dict[str, str]], None], local: Collection[str] = ()
) -> Iterator[None]:
    """While the block runs, parsed `TrainingArguments` end every rank if the ranks were started differently.

    It is done there because the processes can talk to each other from then on, and nothing is loaded yet.

    Args:
        arguments: their class. argv: the command line, without the program.
        check_paths: refuses paths that lead to nothing, of the flags as typed.
        local: flags of the host that may differ between nodes.
    """
    original = arguments.__post_init__

    def __post_init__(self: Any) -> None:
        given = flags_of(argv)
        _check_deepspeed(given)
        with _refusals_as_sentences() if _is_on(given) else nullcontext():
            original(self)
        _check_processes(self, argv, LOCAL_FLAGS.union(local))
        if _is_on(given):
            with together():
                check_paths(given)
                _check_made(self)

    arguments.__post_init__ = __post_init__
    try:
        yield
    finally:
        arguments.__post_init__ = original


@contextmanager
def _refusals_as_sentences() -> Iterator[None]:
    """What transformers has against the flags, such as two precisions, or the start of the group against a launch."""
    try:
        yield
    except VITaskError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        why = " ".join(str(error).split())
        *_, (frame, _) = walk_tb(error.__traceback__)
        if frame.f_globals["__name__"] in _RENDEZVOUS:
            raise VITaskError(
                f"the processes of this run do not find each other ({why}); start them with torchrun or deepspeed"
            ) from None
        raise VITaskError(f"transformers refuses the flags: {why}; change them") from None


def _check_deepspeed(given: dict[str, str]) -> None:
    """Refuses a configuration that is not there or that DeepSpeed refuses; an empty name would train without it."""
    name = given.get("deepspeed")
    if _is_on(given) and name is not None:
        zero_section(configuration(name), name)


def _check_made(args: Any) -> None:
    """Refuses what cannot be made of the flags: a schedule, a tracker, DeepSpeed's engine."""
    flags.check_makes(args)
    check_gathers(args)
    if args.deepspeed:
        own_optimizer.check_matches(args.hf_deepspeed_config)
        config = args.hf_deepspeed_config.config
        check_accepted(config, str(args.deepspeed), bf16=args.bf16, fp16=args.fp16)


def _check_processes(args: Any, argv: Sequence[str], local: Collection[str]) -> None:
    _ = args.device  # asking for it sets up the process group
    given = flags_of(argv)
    if args.deepspeed:
        given["deepspeed"] = json.dumps(args.hf_deepspeed_config.config, sort_keys=True)
    installed = {**versions(), "python": platform.python_version()}
    own = {
        "place": place(),
        "first of node": is_first_of_node(),
        "flags": given,
        "versions": installed,
    }
    processes = gathered(own)
    if not any(_is_on(process["flags"]) for process in processes):
        return  # upstream's own run
    first = processes[0]
    for other in processes[1:]:
        for what, name in (("versions", ""), ("flags", "--")):
            for key in sorted(first[what].keys() | other[what].keys()):
                here, there = first[what].get(key), other[what].get(key)
                if here != there and not (what == "flags" and key in local):
                    raise EveryRankError(_difference(f"{name}{key}", first["place"], here, other["place"], there))
    nodes = sum(process["first of node"] for process in processes)
    parallel = "one process" if len(processes) == 1 else f"{len(processes)} processes on {nodes} node{'s'[: nodes > 1]}"
    zero = f", DeepSpeed ZeRO-{zero_stage(args)}" if args.deepspeed else ""
    say(f"{parallel}{zero}; {', '.join(f'{name} {number}' for name, number in installed.items())}")


def flags_of(argv: Sequence[str]) -> dict[str, str]:
    """The command line as `{flag: value}`; `--flag=value` and `--flag value` are the same."""
    found: dict[str, str] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value
        else:
            found[name] = f"{found.get(name, '')} {word}".strip()
    return found


def _is_on(given: dict[str, str]) -> bool:
    return given.get("vitask", "false").lower() not in ("false", "no", "f", "n", "0")


def _difference(name: str, first: str, here: str | None, second: str, there: str | None) -> str:
    if name == "--deepspeed":
        here, there = ("another content" if value else None for value in (here, there))
    values = (
        f"{place} has {name} {value}" if value else f"{place} has no {name}"
        for place, value in ((first, here), (second, there))
    )
    return (
        f"the processes were not started alike: {', '.join(values)}; use the same command and environment on all nodes"
    )


# After the last step ---------------------------------------------------------------------------------------------


def leave(*, for_good: bool) -> None:
    """Waits until every rank has written what it writes, and takes the process group down.

    Args:
        for_good: nothing follows: end the process here. Under DeepSpeed with transformers 5 the interpreter's own exit
            aborts now and then ("terminate called without an active exception"), and the launcher then takes the run
            for a failed one.
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    dist.destroy_process_group()
    if for_good:
        atexit._run_exitfuncs()  # loggers of the user's choice end their run there
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def lost(error: BaseException) -> str | None:
    """The sentence for an error that means that another process has ended or cannot be reached; None for others."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    for cause in causes(error):
        text = str(cause).strip()
        # NCCL reports its own misuse by the class above these two.
        is_connection = isinstance(cause, dist.DistNetworkError | dist.DistStoreError)
        if is_connection or (isinstance(cause, RuntimeError) and any(part in text for part in CONNECTION_ERRORS)):
            why = text.splitlines()[0].rpartition("] ")[2].partition(". ")[0]  # without where in gloo's source
            if not dist.is_initialized():
                address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                return f"the processes of this run do not find each other at {address} ({why}); check it on all nodes"
            return (
                f"another process of this run has ended or no longer answers ({why}); see what its own node printed. "
                "The same command on all nodes resumes from the last checkpoint"
            )
    return None


def interrupted() -> NoReturn:
    """Ends a run after Ctrl-C, which the launcher sends to all its processes."""
    if is_first_of_node():
        sys.stderr.write("\nvitask: interrupted; the same command resumes from the last checkpoint\n")
        sys.stderr.flush()
    sys.stdout.flush()
    os._exit(130)


def end(sentence: str | None) -> NoReturn:
    """Ends this process at once, past everything that could wait for a process that is gone.

    Args:
        sentence: why; None: another process says it.
    """
    if sentence is not None:
        sys.stderr.write(f"vitask: error: {sentence}\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(1)
