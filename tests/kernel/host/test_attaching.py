"""Programs on interfaces by clsact: ours, others', what is left behind, and what stands in the way.

The rest of splice by clsact is the same suites with `--attach clsact`, or on a kernel before 6.6.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.attach import clsact as attach_clsact
from pyforwarder.datapath.attach import tcx as attach_tcx
from pyforwarder.datapath.attach import unix_names
from pyforwarder.datapath.attach.base import InterfaceTakenError, Side
from pyforwarder.datapath.attach.clsact import PRIORITY, ClsactAttacher
from pyforwarder.datapath.attach.traffic_control import TrafficControl
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.errors import LoadError
from tests.helpers.daemon import START_DEADLINE_S, run_command
from tests.helpers.filters import PARENTS, all_filters, filters, shown, tc
from tests.helpers.netns import private_network
from tests.helpers.peers import ends_with_reset, pair_through
from tests.helpers.spliced_on_loopback import CONFIG, exchange, wait_until_spliced
from tests.helpers.waiting import wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon, Place
    from tests.helpers.faults import Faults
    from tests.helpers.netns import Network
    from tests.kernel.conftest import StartForwarder

LO: Final = 1
SIDES: Final = ("in", "out")
TAKEN: Final = "not spliced: an interface has another program's qdisc or filter"


@pytest.fixture(autouse=True)
def own_network() -> Iterator[Network]:
    """What others set up on `lo` is this test's alone."""
    with private_network() as network:
        yield network


@pytest.fixture(autouse=True)
def by_clsact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(attaching.FORCED, "clsact")


def program(faults: Faults) -> int:
    """Some program for packets, which lets them all pass and counts them."""
    return faults._program_fd


def names(side: str = "in") -> list[str]:
    return [one.name for one in filters("lo", side)]


def send_datagram() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"x", ("127.0.0.1", 9))


def add_u32_filter(*, priority: int) -> None:
    """One that accepts every packet."""
    place = ("dev", "lo", "ingress", "prio", str(priority), "protocol", "ip")
    tc("filter", "add", *place, "u32", "match", "u32", "0", "0")


def refused(reason: str) -> pytest.RaisesExc[InterfaceTakenError]:
    return pytest.raises(InterfaceTakenError, match=reason)


def name_at(place: Place, instance: str = "default") -> str:
    return attach_clsact.name_of(place.bpffs / instance / "splice")


def kill(forwarder: Daemon) -> None:
    forwarder.kill()
    wait_for(lambda: not forwarder.place.processes(), "all of it has ended")


# ---------------------------------------------------------------- the filters


def test_filters_are_as_tc_says_them(bad_network: Faults, tmp_path: Path) -> None:
    attacher = ClsactAttacher(tmp_path)
    attacher.attach(program(bad_network), LO, "in")
    (one,) = shown("lo", "in")
    assert (one["pref"], one["protocol"], one["kind"]) == (PRIORITY, "all", "bpf")
    options = one["options"]
    assert options["bpf_name"] == f"pyforwarder {tmp_path}"
    assert options["direct-action"] is True
    assert options["skip_hw"] is True
    assert shown("lo", "out") == []
    attacher.close()
    assert all_filters() == []


def test_a_packet_goes_by_our_filter_and_on_to_the_next(
    bad_network: Faults, tmp_path: Path
) -> None:
    """-1 (TC_ACT_UNSPEC) of a direct action asks the next filter, as TCX_NEXT does."""
    first, second = ClsactAttacher(tmp_path / "a"), ClsactAttacher(tmp_path / "b")
    with contextlib.closing(first), contextlib.closing(second):
        for attacher in (first, second):
            attacher.attach(program(bad_network), LO, "in")
        with TrafficControl() as control:
            control.add_filter(
                LO, PARENTS["in"], priority=77, name="later", program_fd=program(bad_network)
            )
        bad_network.set()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            socket.create_connection(listener.getsockname()).close()
        wait_for(lambda: bad_network.counts()["matched"] >= 9, "packets")
        # Each of a connection's packets was seen three times.
        wait_for(lambda: bad_network.counts()["matched"] % 3 == 0, "all of them")


def test_our_programs_are_first_among_those_of_others(bad_network: Faults, tmp_path: Path) -> None:
    tc("qdisc", "add", "dev", "lo", "clsact")
    tc(
        *[
            "filter",
            "add",
            "dev",
            "lo",
            "ingress",
            "prio",
            "2",
            "protocol",
            "ip",
            "u32",
            "match",
            "u32",
            "0",
            "0",
        ]
    )
    with TrafficControl() as control:
        control.add_filter(
            LO, PARENTS["in"], priority=1, name="theirs", program_fd=program(bad_network)
        )
    attacher = ClsactAttacher(tmp_path)
    attacher.attach(program(bad_network), LO, "in")
    there = [(one.priority, one.name) for one in filters() if one.kind == "bpf"]
    assert there == [(1, f"pyforwarder {tmp_path}"), (1, "theirs")]
    attacher.close()
    assert [(one.priority, one.name) for one in filters() if one.kind == "bpf"] == [(1, "theirs")]
    assert [one.priority for one in filters() if one.kind == "u32"] != []


def test_what_was_left_is_changed_where_it_is(bad_network: Faults, tmp_path: Path) -> None:
    before = ClsactAttacher(tmp_path)
    before.attach(program(bad_network), LO, "in")
    before.keep()
    before.close()  # as if it had been killed
    with TrafficControl() as control:
        control.add_filter(
            LO, PARENTS["in"], priority=1, name="later", program_fd=program(bad_network)
        )
    (left,) = [one for one in filters() if one.name != "later"]
    after = ClsactAttacher(tmp_path)
    after.attach(program(bad_network), LO, "in")
    # The same handle, and still behind the one that came later.
    assert [one.name for one in filters()] == ["later", left.name]
    assert left in filters()
    after.close()  # it has not got far: what was left stays
    assert left in filters()
    attach_clsact.remove(tmp_path)
    assert names() == ["later"]


def test_one_that_vanished_is_seen_to_be_gone(bad_network: Faults, tmp_path: Path) -> None:
    attacher = ClsactAttacher(tmp_path)
    attacher.attach(program(bad_network), LO, "in")
    attacher.verify(LO, "in")
    assert attacher.has(LO, "in")
    tc("qdisc", "del", "dev", "lo", "clsact")
    attacher.verify(LO, "in")
    assert not attacher.has(LO, "in")
    attacher.attach(program(bad_network), LO, "in")
    assert names() == [f"pyforwarder {tmp_path}"]
    attacher.close()


@pytest.mark.parametrize("side", SIDES)
def test_an_ingress_qdisc_of_others_leaves_no_place(
    bad_network: Faults, tmp_path: Path, side: Side
) -> None:
    """There a filter for egress would look at what comes in."""
    tc("qdisc", "add", "dev", "lo", "ingress")
    with contextlib.closing(ClsactAttacher(tmp_path)) as attacher:
        with refused("lo: another program has an ingress qdisc"):
            attacher.attach(program(bad_network), LO, side)
        assert not attacher.has(LO, side)
    with TrafficControl() as control:
        assert [one.kind for one in control.qdiscs()] == ["ingress"]
        assert control.filters(LO, PARENTS["in"]) == []


def test_another_kind_of_filter_at_the_first_priority_leaves_no_place(
    bad_network: Faults, tmp_path: Path
) -> None:
    tc("qdisc", "add", "dev", "lo", "clsact")
    tc(
        *[
            "filter",
            "add",
            "dev",
            "lo",
            "ingress",
            "prio",
            "1",
            "protocol",
            "ip",
            "u32",
            "match",
            "u32",
            "0",
            "0",
        ]
    )
    before = shown()
    reason = r"lo: .* a filter \(u32\) at priority 1"
    with contextlib.closing(ClsactAttacher(tmp_path)) as attacher, refused(reason):
        attacher.attach(program(bad_network), LO, "in")
    assert shown() == before


def test_filters_that_interfaces_share_leave_no_place(bad_network: Faults, tmp_path: Path) -> None:
    tc("qdisc", "add", "dev", "lo", "ingress_block", "7", "clsact")
    reason = "lo: its filters are shared"
    with contextlib.closing(ClsactAttacher(tmp_path)) as attacher, refused(reason):
        attacher.attach(program(bad_network), LO, "in")


def test_the_kernels_words_are_in_the_error(own_network: Network) -> None:
    del own_network
    with TrafficControl() as control:
        control.add_clsact(LO)
        with pytest.raises(FileExistsError, match="Exclusivity flag on"):
            control.add_clsact(LO)
    with TrafficControl() as control, pytest.raises(OSError, match="device") as raised:
        control.add_clsact(4711)
    assert raised.value.errno == 19  # ENODEV


# ---------------------------------------------------------------- whose they are


def test_two_that_live_have_no_filters_in_common(tmp_path: Path) -> None:
    with contextlib.closing(ClsactAttacher(tmp_path)):
        with pytest.raises(LoadError, match="of a pyforwarder that runs in this network"):
            ClsactAttacher(tmp_path)
        with private_network():
            ClsactAttacher(tmp_path).close()
    ClsactAttacher(tmp_path).close()


def test_a_child_does_not_hold_the_name(tmp_path: Path) -> None:
    attacher = ClsactAttacher(tmp_path)
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_fd)
        os.read(read_fd, 1)  # until the test is over
        os._exit(0)
    os.close(read_fd)
    attacher.close()
    ClsactAttacher(tmp_path).close()
    os.close(write_fd)
    os.waitpid(pid, 0)


def test_a_child_that_lets_go_removes_nothing(bad_network: Faults, tmp_path: Path) -> None:
    attacher = ClsactAttacher(tmp_path)
    attacher.attach(program(bad_network), LO, "in")
    pid = os.fork()
    if pid == 0:
        attacher.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(filters()) == 1
    attacher.close()
    assert filters() == []


_SQUATTER: Final = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
sock.bind(chr(0) + sys.argv[1])
print("there", flush=True)
sys.stdin.read()
"""


def test_a_stranger_that_takes_the_name_is_not_in_the_way(tmp_path: Path) -> None:
    """Any user may take any abstract name."""
    mark = unix_names._mark_of(attach_clsact.name_of(tmp_path))[1:]
    with subprocess.Popen(
        [sys.executable, "-c", _SQUATTER, mark],
        user="nobody",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
    ) as squatter:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == b"there\n"
        ClsactAttacher(tmp_path).close()
        squatter.communicate()


_PASSING: Final = """
import os, signal, sys
from pyforwarder.datapath.attach_clsact import ClsactAttacher
attacher = ClsactAttacher(None)
attacher.attach(int(sys.argv[1]), 1, "in")
print("there", flush=True)
sys.stdin.read()
"""


def test_marks_are_known_without_unix_diag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may be built without it."""

    def refuse() -> set[tuple[bytes, int]]:
        raise FileNotFoundError

    monkeypatch.setattr(unix_names, "_names_and_users", refuse)
    assert not unix_names.is_in_use("a name")
    with contextlib.closing(unix_names.NameInUse("a name")):
        assert unix_names.is_in_use("a name")
        assert not unix_names.is_in_use("another name")
    assert not unix_names.is_in_use("a name")


def test_what_nobody_comes_after_is_removed_by_the_next_when_it_was_killed(
    bad_network: Faults, tmp_path: Path
) -> None:
    fd = program(bad_network)
    with subprocess.Popen(
        [sys.executable, "-c", _PASSING, str(fd)],
        pass_fds=[fd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as passing:
        assert passing.stdout is not None
        assert passing.stdout.readline() == b"there\n"
        ClsactAttacher(tmp_path).close()
        assert len(filters()) == 1  # it lives
        passing.kill()
        passing.wait()
    assert len(filters()) == 1
    ClsactAttacher(tmp_path).close()
    assert filters() == []


def test_a_name_is_as_long_as_it_may_be(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 200) / ("y" * 200)
    assert len(attach_clsact.name_of(long)) < 100
    assert attach_clsact.name_of(long) != attach_clsact.name_of(long / "z")
    assert attach_clsact.name_of(tmp_path / "é").isascii()


# ---------------------------------------------------------------- instances


def test_two_instances_side_by_side_and_others(
    start_forwarder: StartForwarder, place: Place, bad_network: Faults
) -> None:
    """Each `down` removes exactly its own; the qdisc, and what others have in it, stays."""
    tc("qdisc", "add", "dev", "lo", "clsact")
    with TrafficControl() as control:
        for parent in PARENTS.values():
            control.add_filter(
                LO, parent, priority=5, name="theirs", program_fd=program(bad_network)
            )
    theirs = [one for side in SIDES for one in filters("lo", side)]
    one = start_forwarder(CONFIG, instance="one")
    two = start_forwarder(CONFIG, instance="two")
    for side in SIDES:
        assert set(names(side)) == {name_at(place, "one"), name_at(place, "two"), "theirs"}
    for forwarder in (one, two):
        with pair_through(forwarder.address) as ends:
            exchange(*ends)
            wait_until_spliced(forwarder)
            exchange(*ends)
    with pair_through(two.address) as ends:
        exchange(*ends)
        wait_until_spliced(two)
        assert one.stop() == 0
        for side in SIDES:
            assert set(names(side)) == {name_at(place, "two"), "theirs"}
        exchange(*ends)
    assert two.stop() == 0
    assert [one for side in SIDES for one in filters("lo", side)] == theirs


def test_kill_leaves_them_and_the_next_up_replaces_them(
    start_forwarder: StartForwarder, place: Place
) -> None:
    forwarder = start_forwarder(CONFIG)
    with pair_through(forwarder.address) as ends:
        exchange(*ends)
        wait_until_spliced(forwarder)
        exchange(*ends)
        left = [(one, shown("lo", side)) for side in SIDES for one in filters("lo", side)]
        assert [one.name for one, _ in left] == [name_at(place)] * 2
        kill(forwarder)
        assert [one for side in SIDES for one in filters("lo", side)] == [one for one, _ in left]
        exchange(*ends)
        forwarder = start_forwarder(CONFIG)
        exchange(*ends, 100_003)
        (row,) = forwarder.pairs()
        assert row["datapath"] == "splice"
        for (one, before), side in zip(left, SIDES, strict=True):
            assert filters("lo", side) == [one]  # the same handle
            (was,), (now,) = before, shown("lo", side)
            assert was["options"]["prog"]["id"] != now["options"]["prog"]["id"]
    forwarder.wait_for_no_pairs()
    assert forwarder.stop() == 0
    assert all_filters() == []


def test_filters_whose_maps_are_lost_are_replaced(
    start_forwarder: StartForwarder, place: Place
) -> None:
    """Killed before anything was pinned, or bpffs was unmounted: nobody can speak for them."""
    forwarder = start_forwarder(CONFIG)
    with pair_through(forwarder.address) as ends:
        exchange(*ends)
        wait_until_spliced(forwarder)
        exchange(*ends)
        kill(forwarder)
        for path in (place.bpffs / "default" / "splice").iterdir():
            path.unlink()
        (left,) = shown()
        forwarder = start_forwarder(CONFIG)
        (now,) = shown()
        assert now["options"]["bpf_name"] == left["options"]["bpf_name"]
        assert now["options"]["prog"]["id"] != left["options"]["prog"]["id"]
        assert forwarder.pairs() == []
        for end in ends:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                end.send(b"?")
                assert ends_with_reset(end) == b""
    with pair_through(forwarder.address) as ends:
        exchange(*ends)
        wait_until_spliced(forwarder)
        exchange(*ends)


def test_filters_whose_maps_are_lost_go_where_splice_is_not_wanted_either(
    start_forwarder: StartForwarder, place: Place
) -> None:
    forwarder = start_forwarder(CONFIG)
    kill(forwarder)
    directory = place.bpffs / "default" / "splice"
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()
    assert len(all_filters()) == 2
    start_forwarder(CONFIG.replace("datapath: splice", "datapath: copy"))
    assert all_filters() == []


@pytest.mark.needs("tcx")
@pytest.mark.parametrize("first", ["clsact", "tcx"])
def test_nothing_stale_is_left_when_the_way_changes(
    start_forwarder: StartForwarder,
    place: Place,
    first: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two programs would translate every packet. Pairs go on, whichever way is the next."""

    def start(way: str) -> Daemon:
        monkeypatch.setenv(attaching.FORCED, way)
        return start_forwarder(CONFIG)

    def counts() -> dict[str, int]:
        return {
            "tcx": sum(
                bpf.query_interface(LO, kind)
                for kind in (bpf.AttachType.TCX_INGRESS, bpf.AttachType.TCX_EGRESS)
            ),
            "clsact": len(all_filters()),
        }

    second = "tcx" if first == "clsact" else "clsact"
    forwarder = start(first)
    with pair_through(forwarder.address) as ends:
        exchange(*ends)
        wait_until_spliced(forwarder)
        exchange(*ends)
        assert counts() == {first: 2, second: 0}
        kill(forwarder)
        exchange(*ends)
        forwarder = start(second)
        assert counts() == {first: 0, second: 2}
        exchange(*ends, 100_003)
        (row,) = forwarder.pairs()
        assert row["datapath"] == "splice"
    forwarder.wait_for_no_pairs()
    assert forwarder.stop() == 0
    assert counts() == {"tcx": 0, "clsact": 0}


def test_an_interface_that_is_taken_is_told_of_and_does_without(
    start_forwarder: StartForwarder,
) -> None:
    tc("qdisc", "add", "dev", "lo", "ingress")
    forwarder = start_forwarder(CONFIG.replace("datapath: splice", "datapath: auto"), "--prove")
    # Without `lo` nothing can be proven.
    told = forwarder.wait_for_line("warning: no_splice")
    assert TAKEN in told
    assert "lo: another program has an ingress qdisc" in told
    with pair_through(forwarder.address) as ends:
        exchange(*ends)
    assert forwarder.stop() == 0
    assert (
        "ingress"
        in subprocess.run(
            ["tc", "qdisc", "show", "dev", "lo"], capture_output=True, text=True, check=True
        ).stdout
    )


def test_filters_that_somebody_removes_come_back(start_forwarder: StartForwarder) -> None:
    forwarder = start_forwarder(CONFIG)
    tc("qdisc", "del", "dev", "lo", "clsact")
    with pair_through(forwarder.address) as ends:
        exchange(*ends)
        row = forwarder.wait_for_pair(lambda row: row["datapath"] != "copy")
        assert row["reason"] == "not spliced: its handshake was not seen under these addresses"
        exchange(*ends)
    with pair_through(forwarder.address) as ends:
        exchange(*ends)
        wait_until_spliced(forwarder)
        exchange(*ends)


def test_doctor_leaves_nothing(place: Place) -> None:
    done = run_command(place, "doctor", deadline_s=START_DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert "datapath splice   moved real bytes" in done.stdout
    assert all_filters() == []


# ---------------------------------------------------------------- which way


def attach_line(place: Place) -> dict[str, str | bool | None]:
    """What `doctor --json` finds; with `lo` taken, splice does not work, and doctor does."""
    report = json.loads(run_command(place, "doctor", "--json", deadline_s=START_DEADLINE_S).stdout)
    (found,) = [one for one in report["findings"] if one["name"] == "attach"]
    assert isinstance(found, dict)
    return found


def test_doctor_says_what_clsact_means(place: Place) -> None:
    found = attach_line(place)
    assert found["good"] is None
    assert re.match(
        r"clsact: (no tcx .*; )?the programs .* are filters of `tc` ", str(found["detail"])
    )


def test_doctor_names_the_interfaces_that_others_have(place: Place) -> None:
    tc("qdisc", "add", "dev", "lo", "ingress")
    found = attach_line(place)
    assert found["good"] is False
    assert "; lo: another program has an ingress qdisc there" in str(found["detail"])
    assert str(found["detail"]).endswith("remove that qdisc or filter if they shall")


@pytest.mark.needs("tcx")
def test_doctor_says_what_tcx_means(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(attaching.FORCED)
    found = attach_line(place)
    assert found["good"] is None
    assert str(found["detail"]).startswith("tcx: this kernel lets the programs of splice")


def test_only_a_kernel_that_does_not_know_tcx_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else may go wrong is an error, or a host would lose what it has."""
    monkeypatch.delenv(attaching.FORCED)
    said: list[int] = []

    def answer(interface: int, kind: bpf.AttachType) -> int:
        assert (interface, kind) == (0, bpf.AttachType.TCX_INGRESS)
        raise OSError(said[-1], os.strerror(said[-1]))

    monkeypatch.setattr(bpf, "query_interface", answer)
    for code, kind in ((22, "clsact"), (19, "tcx")):  # EINVAL, ENODEV
        attach_tcx.is_supported.cache_clear()
        said.append(code)
        assert attaching.kind() == kind
    for code in (1, 12, 38):  # EPERM, ENOMEM, ENOSYS
        attach_tcx.is_supported.cache_clear()
        said.append(code)
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            attaching.kind()
    attach_tcx.is_supported.cache_clear()
