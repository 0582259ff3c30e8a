"""Programs on interfaces by filters of a clsact qdisc, where the kernel has no tcx (before 6.6).

    tc qdisc add dev N clsact
    tc filter add dev N ingress|egress prio 1 bpf direct-action name "pyforwarder DIRECTORY"

A filter needs no pin: it stays until it is deleted, or its interface goes. So its name says
whose it is: it has the directory where that instance has its pins, which is no other instance's,
and is the same when the instance comes back after a kill -9.  The handle is one of the kernel's
choice, so any number of instances are side by side at one priority. Two containers may share a
network namespace and have the same paths; so a name is marked as in use.

The qdisc is never removed: others may have put their filters into it.

What a program returns means here what it means to tcx: -1 (TC_ACT_UNSPEC) asks the next filter, 2
(TC_ACT_SHOT) drops, and the redirects are the same number (cls_bpf_exec_opcode).

Source: net/sched/cls_bpf.c, sch_ingress.c.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from pyforwarder.datapath.attach import traffic_control
from pyforwarder.datapath.attach.base import InterfaceTakenError, Kind, Side
from pyforwarder.datapath.attach.traffic_control import Filter, TrafficControl
from pyforwarder.datapath.attach.unix_names import NameInUse, is_in_use

# Ahead of all others: what an earlier filter accepts, ours would not see, and bytes of a spliced
# pair would go to sockets that nobody reads.
PRIORITY: Final = 1
_PARENTS: Final[dict[Side, int]] = {"in": traffic_control.INGRESS, "out": traffic_control.EGRESS}
_PREFIX: Final = "pyforwarder "
# Of what nobody takes over, like doctor's: it goes with its process, or is removed by the next.
_PASSING: Final = _PREFIX + "~"
_MOST_NAME_BYTES: Final = 255  # CLS_BPF_NAME_LEN, and a zero
_GONE: Final = (errno.ENOENT, errno.ENODEV, errno.EINVAL)  # filter or qdisc, interface, parent


def name_of(directory: Path) -> str:
    """What the filters of an instance are called that has its pins there."""
    directory = directory.resolve()
    name = _PREFIX + str(directory)
    if len(os.fsencode(name)) > _MOST_NAME_BYTES or not name.isascii():
        name = _PREFIX + hashlib.sha256(os.fsencode(directory)).hexdigest()
    return name


def found_on(directory: Path) -> set[int]:
    """The interfaces on which there are filters of that instance."""
    with contextlib.suppress(OSError), TrafficControl() as tc:
        return {one.interface for one in _filters(tc) if one.name == name_of(directory)}
    return set()


def names() -> set[str]:
    """The names of all filters at our priority, others' too; none if the kernel does not say."""
    with contextlib.suppress(OSError), TrafficControl() as tc:
        return {one.name for one in _filters(tc)}
    return set()


def remove(directory: Path) -> None:
    """Remove the filters of that instance from all interfaces; nothing else. Never raises."""
    with contextlib.suppress(OSError), TrafficControl() as tc:
        for one in [one for one in _filters(tc) if one.name == name_of(directory)]:
            _delete(tc, one)


def _filters(tc: TrafficControl) -> Iterator[Filter]:
    """All filters at our priority of this network namespace."""
    for qdisc in tc.qdiscs():
        if qdisc.kind == "clsact":
            for parent in _PARENTS.values():
                try:
                    there = tc.filters(qdisc.interface, parent)
                except OSError as error:
                    if error.errno not in _GONE:
                        raise
                    continue
                yield from (one for one in there if one.kind == "bpf" and one.priority == PRIORITY)


def _delete(tc: TrafficControl, one: Filter) -> None:
    with contextlib.suppress(OSError):
        tc.delete_filter(one)


class ClsactAttacher:
    """Filters, known by their name."""

    kind: Kind = "clsact"

    def __init__(self, directory: Path | None) -> None:
        """`directory` is where the instance has its pins; None for one that nobody comes after.

        Raises:
            LoadError: another process that lives has these filters.
        """
        name = name_of(directory) if directory is not None else _PASSING + secrets.token_hex(8)
        self._use = NameInUse(name)
        self._name = name
        self._owner_pid = os.getpid()
        self._is_kept = False
        self._attached: set[tuple[Side, int]] = set()
        # (interface, parent) of what a dead daemon has left: its pairs may go on by it, so it stays
        # if we end before we have taken its place.
        self._was_there: set[tuple[int, int]] = set()
        with contextlib.suppress(OSError), TrafficControl() as tc:
            for one in [one for one in _filters(tc) if one.name == name]:
                self._was_there.add((one.interface, one.parent))
        _remove_passed()

    def has(self, interface: int, side: Side) -> bool:
        """Whether there is a filter of ours."""
        return (side, interface) in self._attached

    def attach(self, program_fd: int, interface: int, side: Side) -> None:
        """Add a filter, or change the one of that name that is there."""
        parent = _PARENTS[side]
        with TrafficControl() as tc:
            _make_clsact(tc, interface)
            there = tc.filters(interface, parent)
            ours = [one for one in there if one.name == self._name and one.priority == PRIORITY]
            if ours:
                tc.change_filter(ours[0], program_fd)
                for one in ours[1:]:  # never: but each of them would translate once more
                    _delete(tc, one)
                self._was_there.add((interface, parent))
            else:
                self._add(tc, there, interface, parent, program_fd)
        self._attached.add((side, interface))

    def _add(
        self,
        tc: TrafficControl,
        there: list[Filter],
        interface: int,
        parent: int,
        program_fd: int,
    ) -> None:
        reason = _obstacle_among(there)
        if reason:
            raise InterfaceTakenError(f"{_name_of_interface(interface)}: {reason}", errno.EBUSY)
        try:
            tc.add_filter(
                interface, parent, priority=PRIORITY, name=self._name, program_fd=program_fd
            )
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:  # tc-ctl: `ingress_block`, `egress_block`
                raise InterfaceTakenError(
                    f"{_name_of_interface(interface)}: its filters are shared with other"
                    f" interfaces: {error.strerror}",
                    error.errno,
                ) from error
            raise

    def verify(self, interface: int, side: Side) -> None:
        """Ask the kernel for it."""
        try:
            with TrafficControl() as tc:
                there = tc.filters(interface, _PARENTS[side])
        except OSError:
            there = []
        if not any(one.name == self._name for one in there):
            self._attached.discard((side, interface))

    def interfaces(self) -> set[int]:
        """Where filters are."""
        return {interface for _, interface in self._attached}

    def detach(self, interface: int, side: Side) -> None:
        """Remove the filters of our name there."""
        self._attached.discard((side, interface))
        with contextlib.suppress(OSError), TrafficControl() as tc:
            for one in tc.filters(interface, _PARENTS[side]):
                if one.name == self._name:
                    _delete(tc, one)

    def clear(self) -> None:
        """Remove all of our name; nothing has been attached by us yet."""
        with contextlib.suppress(OSError), TrafficControl() as tc:
            for one in [one for one in _filters(tc) if one.name == self._name]:
                _delete(tc, one)
        self._was_there.clear()

    def keep(self) -> Collection[str]:
        """They outlive us anyway."""
        self._is_kept = True
        return ()

    def close(self) -> None:
        """Remove ours, those that children have attached, too."""
        if os.getpid() != self._owner_pid:
            return
        # One that has attached nothing may be a second daemon's, whose filters these are.
        if not self._is_kept and self._attached:
            with contextlib.suppress(OSError), TrafficControl() as tc:
                for one in [one for one in _filters(tc) if one.name == self._name]:
                    if (one.interface, one.parent) not in self._was_there:
                        _delete(tc, one)
        self._attached.clear()
        self._use.close()


def _make_clsact(tc: TrafficControl, interface: int) -> None:
    """Make sure that there is one, ours or another's."""
    kind = _ingress_kind(tc, interface)
    if not kind:
        try:
            tc.add_clsact(interface)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        kind = _ingress_kind(tc, interface)
    reason = _obstacle_of(kind)
    if reason:
        raise InterfaceTakenError(f"{_name_of_interface(interface)}: {reason}", errno.EBUSY)


def obstacles() -> list[str]:
    """Where others leave no place for our filters, one clause for each interface.

    Any process may ask; nothing is changed.

    Raises:
        OSError: the kernel does not say.
    """
    found = []
    with TrafficControl() as tc:
        for qdisc in tc.qdiscs():
            reason = _obstacle_of(qdisc.kind)
            for parent in () if reason else _PARENTS.values():
                reason = reason or _obstacle_among(tc.filters(qdisc.interface, parent))
            if reason:
                found.append(f"{_name_of_interface(qdisc.interface)}: {reason}")
    return found


def _obstacle_of(kind: str) -> str:
    """Why such a qdisc is in the way; empty if it is not."""
    if kind == "clsact":
        return ""
    # In an ingress qdisc a filter for egress would look at what comes in (ingress_tcf_block).
    return (
        f"another program has an {kind or 'unknown'} qdisc there,"
        " in whose place a clsact would have to be"
    )


def _obstacle_among(there: list[Filter]) -> str:
    """Why these filters are in the way; empty if they are not."""
    for one in there:
        # One priority is for filters of one kind and protocol.
        is_like_ours = one.kind == "bpf" and one.protocol == traffic_control.ALL_PROTOCOLS
        if one.priority <= PRIORITY and one.chain == 0 and not is_like_ours:
            return (
                f"another program has a filter ({one.kind}) at priority {one.priority},"
                " and ours must be the first"
            )
    return ""


def _ingress_kind(tc: TrafficControl, interface: int) -> str:
    return next((one.kind for one in tc.qdiscs() if one.interface == interface), "")


def _name_of_interface(interface: int) -> str:
    with contextlib.suppress(OSError):
        return socket.if_indextoname(interface)
    return f"interface {interface}"


def _remove_passed() -> None:
    """Remove what processes have left that nobody comes after, and that were killed."""
    with contextlib.suppress(OSError), TrafficControl() as tc:
        for one in [one for one in _filters(tc) if one.name.startswith(_PASSING)]:
            if not is_in_use(one.name):
                _delete(tc, one)
