"""Gloo's interface follows NCCL's, by NCCL's rules, unless the user has said which one gloo takes."""

import os
import socket

import psutil
import pytest

from lightning_drm.distributed.interfaces import follow_nccl, matching_interfaces

HERE = ["lo", "docker0", "eth0", "eth01", "ib0", "ib1"]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("eth", ["eth0", "eth01"]),
        ("eth0", ["eth0", "eth01"]),
        ("=eth0", ["eth0"]),
        ("=eth0,ib1", ["eth0", "ib1"]),
        ("ib,eth0", ["eth0", "eth01", "ib0", "ib1"]),
        ("ib1,,docker", ["docker0", "ib1"]),
        ("=ib1:2", ["ib1"]),
        ("lo", ["lo"]),
        ("^docker", ["eth0", "eth01", "ib0", "ib1", "lo"]),
        ("^docker,lo,ib", ["eth0", "eth01"]),
        ("^=eth0,docker", ["docker0", "eth01", "ib0", "ib1", "lo"]),
        ("=eth", []),
        ("wlan", []),
    ],
)
def test_the_rules_are_those_of_nccl(wanted: str, expected: list[str]):
    assert matching_interfaces(wanted, HERE) == expected


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Neither variable is set, and after the test both are as they were."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # by which the value to go back to is noted
        monkeypatch.delenv(name)
    return monkeypatch


def test_gloo_gets_a_whole_name_of_this_machine(said: pytest.MonkeyPatch):
    said.setenv("NCCL_SOCKET_IFNAME", "l")  # a prefix of the loopback, which every machine has
    follow_nccl()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_interfaces_without_an_address_do_not_count(said: pytest.MonkeyPatch):
    found = psutil.net_if_addrs()
    mute = [
        n for n, each in found.items() if {one.family for one in each}.isdisjoint({socket.AF_INET, socket.AF_INET6})
    ]
    said.setenv("NCCL_SOCKET_IFNAME", "=" + ",".join([*mute, "lo"]))
    follow_nccl()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_users_own_value_stays(said: pytest.MonkeyPatch):
    said.setenv("NCCL_SOCKET_IFNAME", "=no such interface")
    said.setenv("GLOO_SOCKET_IFNAME", "mine0,mine1")
    follow_nccl()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0,mine1"


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_value_of_nccl_there_is_nothing_to_follow(value: str | None, said: pytest.MonkeyPatch):
    if value is not None:
        said.setenv("NCCL_SOCKET_IFNAME", value)
    follow_nccl()
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_a_value_that_matches_nothing_is_refused(said: pytest.MonkeyPatch):
    said.setenv("NCCL_SOCKET_IFNAME", "=nowhere0")
    message = r"^NCCL_SOCKET_IFNAME is '=nowhere0', which matches no network interface of this node that has an address"
    with pytest.raises(ValueError, match=message):
        follow_nccl()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
