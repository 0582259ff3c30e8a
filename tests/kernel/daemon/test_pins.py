"""Pins that another version left, and pins that are not ours, where a daemon puts its own."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder import __version__
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.runtime import tables
from pyforwarder.supervisor.files import pins
from pyforwarder.supervisor.files.pins import Stamp
from tests.helpers.daemon import Place, leftovers
from tests.helpers.peers import pair_through
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.kernel.conftest import StartForwarder

FILES: Final = ("listeners", "show", "stats")
GONE: Final = "# the daemon is gone"
CONFIG: Final = """
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules: [{name: named, match: instruction, allow: [loopback]}]
datapath: sockmap
"""


def pin_map(path: Path) -> None:
    """Somebody else's pin: a map."""
    path.parent.mkdir(exist_ok=True)
    fd = bpf.create_map(bpf.MapType.ARRAY, key_bytes=4, value_bytes=8, entries=1, name="theirs")
    bpf.pin(fd, path)
    os.close(fd)


def names_of(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def kill(start_forwarder: StartForwarder, place: Place) -> Path:
    """Where a killed daemon has left its pins."""
    start_forwarder(CONFIG).kill()
    wait_for(lambda: not place.processes(), "its workers end")
    return place.bpffs / "default"


def test_pins_tell_their_maker(place: Place, start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(CONFIG)
    directory = place.bpffs / "default"
    assert names_of(directory) == [*FILES, "version"]
    assert os.readlink(directory / "version") == (
        f"pyforwarder/{__version__} layout {pins.layout()}: listeners show stats"
    )
    assert not (directory / "version").exists()  # and no error for a reader that follows it
    assert "pins_" not in forwarder.output()
    assert forwarder.stop() == 0
    assert leftovers(place) == []


def test_own_leftovers_are_replaced_without_a_word(
    place: Place, start_forwarder: StartForwarder
) -> None:
    kill(start_forwarder, place)
    forwarder = start_forwarder(CONFIG)
    assert "pins_" not in forwarder.output()
    assert GONE not in (place.bpffs / "default" / "show").read_text()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("map", "ksym", marks=pytest.mark.needs("map iterators")),
        pytest.param("ksym", "map", marks=pytest.mark.needs("map iterators")),
        ("ksym", "daemon"),
        ("daemon", "ksym"),
    ],
)
def test_leftovers_of_another_way_are_replaced_without_a_word(
    place: Place, start_forwarder: StartForwarder, first: str, second: str
) -> None:
    """The files are the same, whichever iterator prints them."""
    directory = place.bpffs / "default"
    start_forwarder(CONFIG, prefix=("env", f"PYFORWARDER_VIEW={first}")).kill()
    wait_for(lambda: not place.processes(), "its workers end")
    assert (directory / "show").exists() is (first != "daemon")
    forwarder = start_forwarder(CONFIG, prefix=("env", f"PYFORWARDER_VIEW={second}"))
    assert "pins_" not in forwarder.output()
    for name in FILES:
        assert (directory / name).exists() is (second != "daemon")
        text = (place.run_dir / "default" / "proc" / name).read_text()
        assert GONE not in text
        assert ("no BPF view here" in text) is (second == "daemon")
    assert forwarder.stop() == 0
    assert leftovers(place) == []


@pytest.mark.parametrize(
    ("stamp", "told"),
    [
        (Stamp("0.0.9", pins.layout(), ("show", "stats", "old")), "version=0.0.9"),
        (Stamp(__version__, "0-0123", ("show", "stats", "old")), f"version={__version__}"),
        (None, "version=unknown"),
    ],
    ids=["version", "layout", "no-stamp"],
)
def test_another_versions_leftovers_are_replaced_and_told_of(
    place: Place, start_forwarder: StartForwarder, stamp: Stamp | None, told: str
) -> None:
    directory = kill(start_forwarder, place)
    if stamp is None:
        (directory / "version").unlink()
    else:
        pins.write_stamp(directory, stamp)
        (directory / "stats").rename(directory / "old")  # not a name of this version
    forwarder = start_forwarder(CONFIG)
    line = forwarder.wait_for_line("pins_replaced")
    said = f"pyforwarder info: pins_replaced directory={directory} {told} instance=default"
    assert line.endswith(said)
    assert names_of(directory) == [*FILES, "version"]
    assert GONE not in (directory / "show").read_text()
    assert forwarder.stop() == 0
    assert leftovers(place) == []


@pytest.mark.parametrize("name", ["show", "listeners", "version"])
def test_strangers_pin_under_our_name_is_not_touched(
    place: Place, start_forwarder: StartForwarder, name: str
) -> None:
    directory = place.bpffs / "default"
    pin_map(directory / name)
    inode = (directory / name).stat().st_ino
    forwarder = start_forwarder(CONFIG)
    assert f"names={name}" in forwarder.wait_for_line("warning: pins_left_alone")
    line = forwarder.wait_for_line("warning: no_view")
    assert f"{directory / name}: not made by pyforwarder; remove it, then `up` again" in line
    assert names_of(directory) == [name]
    # It forwards all the same, and what the kernel cannot show the daemon does.
    proc = place.run_dir / "default" / "proc"
    with pair_through(forwarder.address) as (client, server):
        client.sendall(b"x")
        assert server.recv(1) == b"x"
        row = forwarder.wait_for_pair(lambda row: row["datapath"] == "sockmap")
        assert tables.parse((proc / "show").read_text())[0]["id"] == str(row["id"])
    assert forwarder.stop() == 0
    assert (directory / name).stat().st_ino == inode
    (directory / name).unlink()
    directory.rmdir()


def test_strangers_pins_beside_ours_are_told_of_and_stay(
    place: Place, start_forwarder: StartForwarder
) -> None:
    directory = place.bpffs / "default"
    pin_map(directory / "theirs")
    forwarder = start_forwarder(CONFIG)
    assert "names=theirs" in forwarder.wait_for_line("warning: pins_left_alone")
    assert names_of(directory) == [*FILES, "theirs", "version"]
    assert forwarder.stop() == 0
    assert names_of(directory) == ["theirs"]
    (directory / "theirs").unlink()
    directory.rmdir()


def test_stranger_that_took_the_place_meanwhile_stays_at_the_end(
    place: Place, start_forwarder: StartForwarder
) -> None:
    forwarder = start_forwarder(CONFIG)
    directory = place.bpffs / "default"
    (directory / "show").unlink()
    pin_map(directory / "show")
    assert forwarder.stop() == 0
    assert names_of(directory) == ["show"]
    (directory / "show").unlink()
    directory.rmdir()


def test_subdirectory_survives_kill_up_and_down(
    place: Place, start_forwarder: StartForwarder
) -> None:
    # Where what must outlive a daemon is pinned; its maker looks after it.
    first = start_forwarder(CONFIG)
    room = place.bpffs / "default" / "room"
    pin_map(room / "map")
    pins.write_stamp(room, pins.stamp_of(["map"]))
    first.signal(signal.SIGKILL)
    first.wait()
    wait_for(lambda: not place.processes(), "its workers end")
    second = start_forwarder(CONFIG)
    assert "pins_" not in second.output()
    assert GONE not in (place.bpffs / "default" / "show").read_text()
    assert second.stop() == 0
    assert names_of(place.bpffs / "default") == ["room"]
    assert names_of(room) == ["map", "version"]
    subprocess.run(["rm", "-r", place.bpffs / "default"], check=True)


def test_last_instance_removes_the_directory_of_all(
    place: Place, start_forwarder: StartForwarder
) -> None:
    # As below /sys/fs/bpf, where the mount is not ours.
    root = place.bpffs / "pyforwarder"
    below = Place(place.run_dir, root)
    prefix = ("env", f"PYFORWARDER_BPFFS={root}")
    one = start_forwarder(CONFIG, instance="one", prefix=prefix)
    two = start_forwarder(CONFIG, instance="two", prefix=prefix)
    one.kill()
    assert sorted(path.name for path in below.bpffs.iterdir()) == ["one", "two"]
    assert two.stop() == 0
    wait_for(lambda: not place.processes(), "the workers of the first end")
    again = start_forwarder(CONFIG, instance="one", prefix=prefix)
    assert again.stop() == 0
    assert not root.exists()
