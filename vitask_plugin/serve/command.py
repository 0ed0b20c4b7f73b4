"""`vitask serve`: a page on which an image is dropped and judged, served by this machine to itself."""

import argparse
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vitask_plugin.errors import VITaskError
from vitask_plugin.options import at_least
from vitask_plugin.specialist.flags import add_flags, keywords

if TYPE_CHECKING:
    from vitask_plugin.serve.judging import Judge

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLOSING_SECONDS = 1  # that open connections of browsers are waited for


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="folder of a tuned checkpoint")
    add_flags(parser)
    add("--features", metavar="DIR", help="what `vitask tsm extract` wrote: shows the nearest training images")
    add("--data", nargs="+", metavar="JSON", help="the training data that --features are of, for their labels")
    add("--image-folder", metavar="DIR", help="of --data (default: images/ beside the first)")
    add("--host", default=LOOPBACK[0], help="address to listen on (default 127.0.0.1: this machine alone reaches it)")
    port = at_least(0, 65535)
    add("--port", type=int, action=port, default=7860, metavar="N", help="port (default 7860; 0 = any that is free)")
    add("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Raises:
        VITaskError: what is given does not fit together, the address cannot be listened on, or gradio is absent.
    """
    _check(args)
    with contextlib.ExitStack() as stack:
        # SIGTERM ends it as Ctrl-C does, with nothing left behind.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        listening = stack.enter_context(_bound(args.host, args.port))
        uploads = stack.enter_context(tempfile.TemporaryDirectory(prefix="vitask-serve-"))
        _prepare_gradio(uploads)
        judge = load(args)
        with contextlib.suppress(KeyboardInterrupt):
            _serve(judge, args.host, listening, uploads)


def load(args: argparse.Namespace) -> "Judge":
    """What judges the images.

    Raises:
        VITaskError: see `Specialist.load`, `TrainingImages` and `Judge`.
    """
    from vitask_plugin import FeatureStore, Specialist
    from vitask_plugin.serve.judging import Judge
    from vitask_plugin.tsm.nearest import TrainingImages

    specialist = Specialist.load(args.checkpoint, device=args.device, **keywords(args))
    training = None
    if args.features:
        folder = args.image_folder or Path(args.data[0]).parent / "images"
        store = FeatureStore.open(args.features)
        training = TrainingImages(store, args.data, folder, specialist.task, specialist.classes)
    return Judge(specialist, training)


def _check(args: argparse.Namespace) -> None:
    if args.features and not (args.tsm and args.data):
        raise VITaskError(
            "--features is of a TSM and of training data; give --tsm with this TSM and --data with the JSON files "
            "whose labels are shown"
        )
    if not args.features and (args.data or args.image_folder):
        raise VITaskError("--data and --image-folder say what --features are of; give --features too")


def _bound(host: str, port: int) -> socket.socket:
    """A socket with this address, before anything is loaded."""
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        own = socket.socket(family, kind, number)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        own.bind(address)
    except OSError as error:
        raise VITaskError(
            f"{host}:{port} cannot be listened on ({error.strerror}); give another --port, or --host with an address "
            "of this machine"
        ) from None
    if not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        logging.getLogger(__name__).warning(
            "--host %s is reached from other machines: whoever reaches it can use the page and see the training images "
            "that it shows, without a password and without encryption",
            host,
        )
    return own


def _prepare_gradio(uploads: str) -> None:
    """Before gradio is imported: it asks nobody anything, and keeps what is dropped on the page in one folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = uploads
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise VITaskError(
            f"the page needs gradio, which is not installed ({error}); pip install 'vitask-plugin[serve]' (it goes "
            "with transformers 5 alone)"
        ) from None


def _serve(judge: "Judge", host: str, listening: socket.socket, uploads: str) -> None:
    import uvicorn

    from vitask_plugin.serve.page import make_app

    port = listening.getsockname()[1]
    address = ipaddress.ip_address(listening.getsockname()[0].partition("%")[0])
    hosts = frozenset({*LOOPBACK, host.lower(), str(address)}) if address.is_loopback else None
    app = make_app(judge, judge.title, judge.summary, uploads, hosts)
    settings: dict[str, Any] = {"log_level": "warning", "lifespan": "on", "timeout_graceful_shutdown": CLOSING_SECONDS}
    shown = f"[{host}]" if ":" in host else host
    listening.listen()  # who is early waits
    tqdm.write(f"{judge.title}: http://{shown}:{port} (Ctrl-C ends it)")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(app, **settings)).run(sockets=[listening])
