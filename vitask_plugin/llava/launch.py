"""Before the first step and after the last: the processes of a run agree with each other, and leave together.

Works without a process group too: one process agrees with itself. A *node* is what one launcher started, so that its
processes are counted from local rank 0.
"""

import atexit
import json
import os
import platform
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

import torch.distributed as dist

from vitask_plugin.deepspeed.reading import check_accepted, configuration, zero_section
from vitask_plugin.errors import VITaskError, causes
from vitask_plugin.llava import flags, paths
from vitask_plugin.llava.checkpoint import versions
from vitask_plugin.llava.zero import check_gathers
from vitask_plugin.training import own_optimizer
from vitask_plugin.training.peers import EveryRankError

# What may differ between nodes: where things lie, and what the launcher adds. What samples are made of is compared by
# content, see `check_data`; weights come from rank 0 whatever the others read.
LOCAL_FLAGS = {
    "local_rank",
    "output_dir",
    "logging_dir",
    "cache_dir",
    "data_path",
    "image_folder",
    "model_name_or_path",
    "vision_tower",
    "pretrain_mm_mlp_adapter",
    "vitask_tsm",
    "vitask_features",
    "vitask_connector_path",
}
# How a closed connection or one that does not answer shows: gloo raises a bare RuntimeError.
CONNECTION_ERRORS = (
    *("gloo/transport", "Gloo connect", "Connection closed by peer", "Connection reset by peer"),
    *("remote process exited", "socketStartConnect", "Watchdog caught collective operation timeout"),
)
# Modules that look in the environment for the other processes, while the training arguments set themselves up.
_RENDEZVOUS = ("torch.distributed.rendezvous", "accelerate.state", "deepspeed.comm.comm")


# Talking to each other -------------------------------------------------------------------------------------------


def gathered(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order. All ranks have to call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agree(sentence: str | None) -> None:
    """Ends all ranks if one of them has something against going on. All ranks have to call it.

    Raises:
        EveryRankError: on every rank, with the sentence of the first one that has any.
    """
    for found in gathered(sentence):
        if found is not None:
            raise EveryRankError(found)


@contextmanager
def together() -> Iterator[None]:
    """Bad input that one rank meets in the block ends all of them. All ranks have to run it.

    Raises:
        EveryRankError: see `agree`.
    """
    sentence = None
    try:
        yield
    except VITaskError as error:
        sentence = str(error)
    agree(sentence)


def say(line: str) -> None:
    """A line on standard error, by rank 0."""
    if _rank() == 0:
        sys.stderr.write(f"vitask: {line}\n")
        sys.stderr.flush()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_first_of_node() -> bool:
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def is_one_of_several() -> bool:
    """Whether this process has found the others of its run."""
    return dist.is_initialized() and dist.get_world_size() > 1


def speaks(error: VITaskError) -> bool:
    """Whether this process says what is wrong, or leaves it to the first of its node, which has the same to say."""
    alike = isinstance(error, EveryRankError) or not dist.is_initialized()  # one node, one command line
    return is_first_of_node() or not alike


def shared(directory: str | Path) -> bool:
    """Whether all ranks see `directory`, which is made if need be, as one and the same. All ranks have to call it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark = directory / gathered(f".vitask-{uuid.uuid4().hex}")[0]
    try:
        if _rank() == 0:
            mark.touch()
        gathered(None)  # it is there before anyone looks
        return all(gathered(mark.exists()))
    finally:
        if _rank() == 0:
            mark.unlink(missing_ok=True)


# Before the first step -------------------------------------------------------------------------------------------


@contextmanager
def checked(arguments: type, argv: Sequence[str]) -> Iterator[None]:
    """While the block runs, upstream's parsed `TrainingArguments` end every rank if the ranks were started differently.

    It is done there because the processes can talk to each other from then on, and nothing is loaded yet.

    Args:
        arguments: upstream's class. argv: the command line, without the program.
    """
    original = arguments.__post_init__

    def __post_init__(self: Any) -> None:
        given = flags_of(argv)
        _check_deepspeed(given)
        with _refusals_as_sentences() if _is_on(given) else nullcontext():
            original(self)
        _check_processes(self, argv)
        if _is_on(given):
            with together():
                paths.check(given)
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


def _check_processes(args: Any, argv: Sequence[str]) -> None:
    _ = args.device  # asking for it sets up the process group
    given = flags_of(argv)
    if args.deepspeed:
        given["deepspeed"] = json.dumps(args.hf_deepspeed_config.config, sort_keys=True)
    installed = {**versions(), "python": platform.python_version()}
    own = {
        "place": _place(),
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
                if here != there and not (what == "flags" and key in LOCAL_FLAGS):
                    raise EveryRankError(_difference(f"{name}{key}", first["place"], here, other["place"], there))
    nodes = sum(process["first of node"] for process in processes)
    parallel = "one process" if len(processes) == 1 else f"{len(processes)} processes on {nodes} node{'s'[: nodes > 1]}"
    zero = f", DeepSpeed ZeRO-{zero_stage(args)}" if args.deepspeed else ""
    say(f"{parallel}{zero}; {', '.join(f'{name} {number}' for name, number in installed.items())}")


def _place() -> str:
    return f"rank {_rank()} on {socket.gethostname()}"


def zero_stage(args: Any) -> int | None:
    """Of upstream's training arguments; None without DeepSpeed."""
    if not args.deepspeed:
        return None
    return int(zero_section(args.hf_deepspeed_config.config, str(args.deepspeed)).stage)


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


def check_data(digests: dict[str, str]) -> None:
    """Ends every rank if one of them would train on something else.

    Args:
        digests: `{what: hex digest of its content}`, the same keys on all ranks.
    """
    processes = gathered((_place(), digests))
    first, expected = processes[0]
    for other, found in processes[1:]:
        for what in expected:
            if found[what] != expected[what]:
                raise EveryRankError(
                    f"the processes see different {what}: {first} {expected[what][:12]}, {other} {found[what][:12]}; "
                    "copy it again, so that all nodes have the same"
                )
    same = " on every rank" if len(processes) > 1 else ""
    say(f"{', '.join(f'{what} {digest[:12]}' for what, digest in expected.items())}{same}")


def check_disk(output_dir: str, *, save_on_each_node: bool) -> None:
    """Ends every rank if the folder cannot be written to, or nodes would spoil or lack each other's files there."""
    with together():
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output_dir):
                pass
        except OSError as error:
            raise VITaskError(f"--output_dir {output_dir!r} cannot be written to ({error}); give another") from None
    nodes = sum(gathered(is_first_of_node()))
    if nodes == 1:
        return
    one_disk = shared(output_dir)
    if one_disk and save_on_each_node:
        raise EveryRankError(
            f"--output_dir {output_dir!r} is one folder for all nodes, and --save_on_each_node True makes each of them "
            "write the same files there; leave that flag out"
        )
    if not one_disk and not save_on_each_node:
        raise EveryRankError(
            f"--output_dir {output_dir!r} is another folder on each node, and without --save_on_each_node True no node "
            "has all that a run is resumed from; give that flag, or a folder on a disk that all nodes share"
        )
    say(f"{output_dir} is {'one folder for all nodes' if one_disk else 'a folder of its own on each node'}")


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
                "The same command on all nodes goes on from the last checkpoint"
            )
    return None


def interrupted() -> NoReturn:
    """Ends a run after Ctrl-C, which the launcher sends to all its processes."""
    if is_first_of_node():
        sys.stderr.write("\nvitask: interrupted; the same command goes on from the last checkpoint\n")
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
