"""Whose an address is, by what its neighbours answer, and on which interface it goes."""

from __future__ import annotations

import socket
from collections import namedtuple

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.errors import ControlError
from pyforwarder.runtime import moving_addresses as addresses

MAC = bytes.fromhex("02aabbccddee")
Address = namedtuple("Address", "family address netmask")


@pytest.fixture
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {
        "lo": [Address(socket.AF_INET, "127.0.0.1", "255.0.0.0")],
        "front": [
            Address(socket.AF_INET, "10.1.0.11", "255.255.255.0"),
            Address(socket.AF_INET6, "fe80::1%front", "ffff:ffff:ffff:ffff::"),
            Address(socket.AF_INET6, "fd01::11", "ffff:ffff:ffff:ffff::"),
        ],
        "back": [
            Address(socket.AF_INET, "10.2.0.11", "255.255.255.0"),
            Address(socket.AF_INET, "10.2.0.1", "255.255.255.255"),
        ],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: has)


@pytest.mark.usefixtures("_host")
def test_an_address_goes_where_its_network_is() -> None:
    assert [addresses.interface_of(ip) for ip in ("10.1.0.1", "fd01::1", "10.2.0.1")] == [
        "front",
        "front",
        "back",
    ]
    with pytest.raises(ControlError, match=r"10\.9\.0\.1 is in the network of no interface"):
        addresses.interface_of("10.9.0.1")
    assert addresses.here(["10.1.0.1", "10.2.0.1", "fd01:0::11"]) == ["10.2.0.1", "fd01:0::11"]


def test_an_answer_names_the_host_that_has_the_address() -> None:
    reply = addresses.arp(2, MAC, bytes([10, 1, 0, 1]), bytes(6), bytes(4))
    assert addresses.said_by(reply, "10.1.0.1") == "02:aa:bb:cc:dd:ee"
    assert addresses.said_by(reply, "10.1.0.2") == ""
    # A probe for the address: nobody has it by that.
    assert (
        addresses.said_by(addresses.arp(1, MAC, bytes(4), bytes(6), reply[28:32]), "10.1.0.1") == ""
    )
    said = bytes([136, 0, 0, 0, 0x20, 0, 0, 0]) + socket.inet_pton(socket.AF_INET6, "fd01::1")
    assert addresses.said_by(said + b"\x02\x01" + MAC, "fd01::1") == "02:aa:bb:cc:dd:ee"
    assert addresses.said_by(said, "fd01::1") == "another host"
    assert addresses.said_by(said, "fd01::2") == ""


@given(st.binary(max_size=100), st.sampled_from(["10.1.0.1", "fd01::1"]))
def test_any_answer_is_read(data: bytes, text: str) -> None:
    assert isinstance(addresses.said_by(data, text), str)
