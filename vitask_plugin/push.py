"""`vitask push`: a checkpoint with its connector, its record and its model card, to the Hub.

What is sent is listed first. No image, no feature, no state of an optimizer goes, and no path of this machine.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from vitask_plugin import write_card
from vitask_plugin.files import check_folder
from vitask_plugin.sharing import hub
from vitask_plugin.sharing.card import CARD_FILE
from vitask_plugin.sharing.facts import FACTS_FILE
from vitask_plugin.sharing.pushed import pushed


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="output of a training with --vitask True")
    add("repo", metavar="REPO", help="name on the Hub, OWNER/NAME; it is made if it is not there")
    add("--private", action="store_true", help="into a private repository; a public one that is there is refused")
    add("--results", nargs="+", default=[], metavar="DIR", help="write the card anew first, with these of lmms-eval")
    add("--dry-run", action="store_true", help="list what would be sent, and send nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    check_folder(args.checkpoint, "checkpoint")
    # A card without the facts is none of ours: PEFT writes an empty one beside each adapter.
    if args.results or not all((Path(args.checkpoint) / name).is_file() for name in (CARD_FILE, FACTS_FILE)):
        write_card.write(args.checkpoint, args.results)
    if args.dry_run:
        for line in hub.listed(pushed(args.checkpoint), args.repo):
            tqdm.write(line)
        return
    tqdm.write(hub.push(args.checkpoint, args.repo, say=tqdm.write, private=args.private or None))
