"""Two hosts on one machine: network namespaces joined by a cable (a veth pair), with nothing else in reach."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "veth"


class CannotMakeHosts(Exception):
    """Why there can be no namespaces here."""


class Hosts:
    """Made on entry and removed on exit, with every process in them. Names are of this process, so runs can coexist."""

    def __init__(self) -> None:
        self.names = [f"vitask-{os.getpid()}-{number}" for number in range(2)]

    def __enter__(self) -> "Hosts":
        if os.geteuid() != 0 or shutil.which("ip") is None:
            raise CannotMakeHosts("network namespaces need root and iproute2")
        try:
            for name in self.names:
                _ip("netns", "add", name)
            first, second = self.names
            _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", INTERFACE, "up")
        except subprocess.CalledProcessError as error:
            self.__exit__()
            raise CannotMakeHosts(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        return self

    def __exit__(self, *error: object) -> None:
        for node, name in enumerate(self.names):
            if Path("/run/netns", name).exists():
                self.kill(node)
                _ip("netns", "delete", name)

    def start(self, node: int, command: str, log: Path, cwd: Path, **environment: str) -> subprocess.Popen:
        """A shell command on a node; what it prints goes to `log`."""
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE, **environment}
        with log.open("w") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[node], "bash", "-c", command],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=cwd,
                env=variables,
                start_new_session=True,
            )

    def kill(self, node: int) -> None:
        """SIGKILL to every process of a node at once, as when it is switched off. Its connections are closed."""
        for process in _ip("netns", "pids", self.names[node]).split():
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                continue

    def unplug(self, node: int) -> None:
        """Pulls the cable: nothing arrives any more, and no connection is closed."""
        _ip("-n", self.names[node], "link", "set", INTERFACE, "down")

    def plug(self) -> None:
        for name in self.names:
            _ip("-n", name, "link", "set", INTERFACE, "up")


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
