"""Which network interface gloo connects over: NCCL's, unless a user names another.

Where nodes have several networks, people say in ``NCCL_SOCKET_IFNAME`` over which one they reach each other. Gloo reads
a variable of its own, and without it takes the address that the hostname stands for, which may be the loopback's. NCCL
takes prefixes, and gloo exact names.

Of several interfaces that match, gloo gets the first, as NCCL's own bootstrap does. Given more, gloo would use each of
them, and every other node would need as many; what is sent here is small.
"""

import os
import socket
from collections.abc import Sequence

import psutil

_NCCL, _GLOO = "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"


def follow_nccl() -> None:
    """Sets ``GLOO_SOCKET_IFNAME`` by ``NCCL_SOCKET_IFNAME``, where only the latter is set.

    To be called before a process group is made, as gloo reads the variable then.

    Raises:
        ValueError: If no interface of this machine matches.
    """
    wanted = os.environ.get(_NCCL)
    if not wanted or _GLOO in os.environ:
        return
    found = _with_address()
    matching = matching_interfaces(wanted, found)
    if not matching:
        raise ValueError(
            f"{_NCCL} is {wanted!r}, which matches no network interface of this node that has an address: "
            f"{', '.join(found)}."
        )
    os.environ[_GLOO] = matching[0]


def matching_interfaces(wanted: str, interfaces: Sequence[str]) -> list[str]:
    """The interfaces that a value of ``NCCL_SOCKET_IFNAME`` stands for.

    Args:
        wanted: Prefixes with commas between them. With ``=`` before the first one all are whole names, and with ``^``
            before it all are excluded.
        interfaces: The names of a machine's interfaces.

    Returns:
        Those that match, in the order of ``interfaces``. Where others are excluded, the loopback comes last: it reaches
        no other node.

    Example:
        >>> here = ["lo", "eth0", "eth01", "docker0"]
        >>> [matching_interfaces(wanted, here) for wanted in ("eth", "=eth0", "docker,eth01")]
        [['eth0', 'eth01'], ['eth0'], ['eth01', 'docker0']]
        >>> [matching_interfaces(wanted, here) for wanted in ("^docker", "^=eth0,docker0", "ib")]
        [['eth0', 'eth01', 'lo'], ['eth01', 'lo'], []]
    """
    excluded = wanted.startswith("^")
    wanted = wanted.removeprefix("^")
    exact = wanted.startswith("=")
    # NCCL lets a port follow a name, and it means nothing to sockets.
    names = [entry.partition(":")[0] for entry in wanted.removeprefix("=").split(",") if entry]
    matching = [
        interface
        for interface in interfaces
        if any(interface == name if exact else interface.startswith(name) for name in names) != excluded
    ]
    return sorted(matching, key=lambda interface: interface == "lo") if excluded else matching


def _with_address() -> list[str]:
    """The interfaces that have an IP address, in the system's order."""
    families = {socket.AF_INET, socket.AF_INET6}
    return [
        name for name, found in psutil.net_if_addrs().items() if not families.isdisjoint(each.family for each in found)
    ]
