"""Two nodes on one machine, for tests: network namespaces with a cable between them, and a hostname each.

Processes on a node see the machine's files, a loopback of their own, and the other node at the other end of the cable.
No name server knows the hostnames. It takes Linux, ``unshare``, ``nsenter``, ``ip``, and the permission for namespaces,
which a user has as root or in a user namespace.
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from helpers import warm

CABLE = "cable"  # so the interface's name begins on both nodes; it goes on in another way on each
PROCESSES = 2  # on each node


class NoNodesError(Exception):
    """This machine makes no nodes; the message is the command that failed and what it said."""


@dataclass(frozen=True)
class Node:
    """One of two nodes.

    Attributes:
        number: 0 or 1.
        name: Its hostname.
        holder: A process on it that does nothing.
    """

    number: int
    name: str
    holder: int

    @property
    def address(self) -> str:
        """The address of its end of the cable."""
        return f"10.77.0.{self.number + 1}"

    @property
    def interface(self) -> str:
        """The name of its end of the cable."""
        return f"{CABLE}{self.name}"

    def command(self, *words: object) -> list[str]:
        """A command line that runs another one on this node."""
        user = ["--user", "--preserve-credentials"] if os.geteuid() else []
        return ["nsenter", "--target", str(self.holder), *user, "--net", "--uts", *map(str, words)]

    def do(self, *words: object) -> None:
        """Runs a command on this node, which must succeed.

        Raises:
            NoNodesError: If it fails.
        """
        command = self.command(*words)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoNodesError(f"{shlex.join(command)}: {done.stderr.strip()}")

    def kill(self) -> None:
        """Kills every process on it."""
        here = Path(f"/proc/{self.holder}/ns/net").readlink()
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # processes that have ended meanwhile, or belong to somebody else
                if int(process.name) != self.holder and (process / "ns/net").readlink() == here:
                    os.kill(int(process.name), signal.SIGKILL)

    def pull_cable(self) -> None:
        """Cuts it off the other node: no connection closes, but nothing comes through any more."""
        self.do("ip", "link", "set", self.interface, "down")


@contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Makes two nodes, which end with all processes on them.

    Raises:
        NoNodesError: If the machine makes none.
    """
    with ExitStack() as stack:
        user = ["--user", "--map-root-user"] if os.geteuid() else []
        first = stack.enter_context(_node(0, "left", ["unshare", *user, "--net", "--uts"]))
        second = stack.enter_context(_node(1, "right", first.command("unshare", "--net", "--uts")))
        peer = ["peer", "name", second.interface, "netns", second.holder]
        first.do("ip", "link", "add", first.interface, "type", "veth", *peer)
        for node in (first, second):
            node.do("ip", "address", "add", f"{node.address}/24", "dev", node.interface)
            for interface in (node.interface, "lo"):
                node.do("ip", "link", "set", interface, "up")
        yield first, second


@contextmanager
def _node(number: int, name: str, unshare: Sequence[str]) -> Iterator[Node]:
    script = f"import signal, socket; socket.sethostname({name!r}); print('made', flush=True); signal.pause()"
    command = [*unshare, sys.executable, "-c", script]
    try:
        holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise NoNodesError(f"{shlex.join(command)}: {error}") from error
    with holder:
        if holder.stdout.readline() != "made\n":
            raise NoNodesError(f"{shlex.join(command)}: {holder.stderr.read().strip()}")
        node = Node(number, name, holder.pid)
        try:
            yield node
        finally:
            node.kill()
            holder.kill()


def torchrun(
    nodes: Sequence[Node], rendezvous: str, command: Sequence[object], environment: Mapping[str, str], prints: Path
) -> list[ForkServerProcess]:
    """Starts torchrun on each node, for two processes on each.

    Args:
        nodes: The nodes.
        rendezvous: ``static``, at the first node; or ``c10d``, at the second one, while rank 0 is on the first.
        command: What follows ``python`` on the command line of each process.
        environment: Environment variables.
        prints: A folder for what each node prints, in two files of its name.
    """
    started = []
    for node in nodes:
        if rendezvous == "static":
            meeting = ["--node_rank", node.number, "--master_addr", nodes[0].address, "--master_port", 29500]
        else:
            host = nodes[1]
            meeting = ["--rdzv_backend", "c10d", "--rdzv_id", "nodes", "--rdzv_endpoint", f"{host.address}:29400"]
            # By themselves they ask a name server which node hosts the store, and by which address others reach it.
            meeting += ["--rdzv_conf", f"is_host={int(node is host)}", "--local_addr", node.address]
        size = ["--nnodes", len(nodes), "--nproc_per_node", PROCESSES]
        words = [str(word) for word in warm.torchrun([*size, *meeting], command)]
        files = {"out": prints / f"{node.name}.out", "err": prints / f"{node.name}.err"}
        started.append(warm.fork(_interpret_on, node.holder, words, environment=environment, **files))
    return started


def _interpret_on(holder: int, words: Sequence[str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # Python itself has setns since 3.12
    for kind in [*(["user"] if os.geteuid() else []), "net", "uts"]:
        with Path(f"/proc/{holder}/ns/{kind}").open() as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns to {namespace.name}")
    warm.interpret(words)
