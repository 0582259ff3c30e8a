"""Pins of spliced pairs that this version cannot take over: of another one, not whole, or strange.

Nobody can speak for those pairs any more, so their peers are reset, and what is pinned goes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import ABI_VERSION
from pyforwarder.datapath.splice import session_maps
from pyforwarder.datapath.splice.abi import VERSION
from tests.helpers.daemon import leftovers
from tests.helpers.peers import ends_with_reset, pair_through
from tests.helpers.spliced_on_loopback import CONFIG, exchange, wait_until_spliced
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    import socket

    from tests.helpers.daemon import Daemon, Place
    from tests.kernel.conftest import StartForwarder

FLOWS, SPLICES, PAIRS = f"flows_{VERSION}", f"splices_{VERSION}", f"pairs_{ABI_VERSION}"
LINKS: Final = ("in_1", "out_1")
TOLD: Final = "warning: splice_pins_replaced"


def make_older(directory: Path) -> None:
    for name in (FLOWS, SPLICES, PAIRS):
        stem, version = name.split("_")
        (directory / name).rename(directory / f"{stem}_{int(version) - 1}")


def make_older_splices(directory: Path) -> None:
    (directory / SPLICES).rename(directory / f"splices_{VERSION - 1}")


def remove(name: str, directory: Path) -> None:
    (directory / name).unlink()


def put_strange_map(name: str, directory: Path) -> None:
    """Under the name of one of ours, and of another shape."""
    (directory / name).unlink()
    pin_map(directory / name)


def put_link(name: str, directory: Path) -> None:
    """Something that is no map."""
    (directory / name).unlink()
    link = directory / LINKS[0]
    if link.exists():
        link.rename(directory / name)
    else:
        (directory / name).symlink_to("nowhere")


def all_pins() -> list[str]:
    """What a forwarder has pinned; filters of clsact need none."""
    links = LINKS if attaching.kind() == "tcx" else ()
    return sorted((FLOWS, SPLICES, PAIRS, *session_maps.PINS, *links))


def pin_map(path: Path) -> None:
    fd = bpf.create_map(bpf.MapType.ARRAY, key_bytes=4, value_bytes=8, entries=1, name="strange")
    bpf.pin(fd, path)
    os.close(fd)


def kill(forwarder: Daemon, place: Place) -> Path:
    """Where its pins are."""
    forwarder.kill()
    wait_for(lambda: not place.processes(), "all of it has ended")
    return place.bpffs / "default" / "splice"


def is_spliced_again(forwarder: Daemon) -> None:
    forwarder.wait_for_no_pairs()
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
        wait_until_spliced(forwarder)
        exchange(client, server, 100_003)
    forwarder.wait_for_no_pairs()


def is_told_that_it_is_over(ends: tuple[socket.socket, socket.socket]) -> None:
    """Each is reset by its next packet, if not before."""
    for end in ends:
        try:
            end.send(b"?")
        except (ConnectionResetError, BrokenPipeError):
            continue
        assert ends_with_reset(end) == b""


SPOILS: Final[dict[str, Callable[[Path], None]]] = {
    "another version": make_older,
    "another version of one": make_older_splices,
    "without pairs": partial(remove, PAIRS),
    "strange flows": partial(put_strange_map, FLOWS),
    "strange splices": partial(put_strange_map, SPLICES),
    "no map": partial(put_link, FLOWS),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_cannot_be_taken_over_is_replaced_and_told_of(
    place: Place, start_forwarder: StartForwarder, spoil: str
) -> None:
    forwarder = start_forwarder(CONFIG)
    with pair_through(forwarder.address) as ends:
        exchange(*ends)
        wait_until_spliced(forwarder)
        exchange(*ends)
        directory = kill(forwarder, place)
        assert sorted(os.listdir(directory)) == all_pins()
        SPOILS[spoil](directory)
        exchange(*ends)  # the programs know nothing of it
        forwarder = start_forwarder(CONFIG)
        assert f" directory={directory} " in forwarder.wait_for_line(TOLD)
        assert forwarder.pairs() == []
        is_told_that_it_is_over(ends)
    is_spliced_again(forwarder)
    assert sorted(os.listdir(directory)) == all_pins()
    assert forwarder.stop() == 0
    assert leftovers(place) == []


@pytest.mark.each_attachment
def test_pins_of_another_version_beside_our_own_are_removed(
    place: Place, start_forwarder: StartForwarder
) -> None:
    """An `up` that died in the midst of it may have left both, and links to what is gone."""
    forwarder = start_forwarder(CONFIG)
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
        wait_until_spliced(forwarder)
        exchange(client, server)
        directory = kill(forwarder, place)
        pin_map(directory / f"splices_{VERSION - 1}")
        pin_map(directory / "in_4711")
        forwarder = start_forwarder(CONFIG)
        assert TOLD not in forwarder.output()
        exchange(client, server, 100_003)
        (row,) = forwarder.pairs()
        assert row["datapath"] == "splice"
    is_spliced_again(forwarder)
    assert sorted(os.listdir(directory)) == all_pins()


def test_a_stranger_s_pin_beside_ours_is_not_touched(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(CONFIG)
    directory = kill(forwarder, place)
    pin_map(directory / "theirs")
    make_older(directory)
    forwarder = start_forwarder(CONFIG)
    is_spliced_again(forwarder)
    assert forwarder.stop() == 0
    assert os.listdir(directory) == ["theirs"]
    (directory / "theirs").unlink()


def test_pins_of_another_version_are_replaced_where_splice_is_not_wanted_either(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(CONFIG)
    directory = kill(forwarder, place)
    make_older(directory)
    forwarder = start_forwarder(CONFIG.replace("datapath: splice", "datapath: copy"))
    forwarder.wait_for_line(TOLD)
    with pair_through(forwarder.address) as (client, server):
        exchange(client, server)
    assert forwarder.stop() == 0
    assert leftovers(place) == []
