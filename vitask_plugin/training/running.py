"""How a run ends, on one process or several: well, with one sentence, interrupted, or for another process's sake."""

import sys
from collections.abc import Callable
from typing import NoReturn

from vitask_plugin.errors import VITaskError
from vitask_plugin.training import agreement, disk, processes


def run(work: Callable[[], None], *, for_good: bool) -> None:
    """Calls `work`; bad input ends the program with one sentence and status 1.

    Args:
        for_good: nothing follows in this program, see `processes.leave`.
    """
    try:
        work()
        processes.leave(for_good=for_good)
    except VITaskError as error:
        stop(error)
    except KeyboardInterrupt:
        processes.interrupted()
    except Exception as error:
        output_dir = processes.flags_of(sys.argv[1:]).get("output_dir", "")
        sentence = processes.lost(error) or disk.full(error, output_dir, "the trained weights")
        if sentence is None:
            raise
        processes.end(sentence)


def stop(error: VITaskError) -> NoReturn:
    """Ends the program with the one sentence; a DataLoader worker puts its traceback before it."""
    sentence = str(error).rpartition("VITaskError: ")[2].strip() if agreement.speaks(error) else None
    if agreement.is_one_of_several():
        processes.end(sentence)
    sys.exit(1 if sentence is None else f"vitask: error: {sentence}")
