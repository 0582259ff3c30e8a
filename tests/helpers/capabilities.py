"""What this host's kernel can do, each thing tried once, and what its version says that it must.

`TABLE` says for each capability from which kernel on a host must have it.  One that is missing on
a host that must have it is a fault, unless the host is known to refuse exactly that (`REFUSALS`):
then the tests assert what such a host gives.  tests/kernel/host/test_host.py fails for a fault;
`needs("tcx")` on a test leaves it out where the table excuses the host, and nowhere else.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import os
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyforwarder.datapath.ebpf import btf, probing
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.errors import LoadError
from pyforwarder.runtime import host
from tests.helpers.netns import private_network


class State(enum.Enum):
    """What came of looking for a capability."""

    PRESENT = "yes"
    TOO_OLD = "too old"  # the kernel is older than what brought it
    REFUSED = "refused"  # by one of REFUSALS
    MISSING = "MISSING"  # a host like this must have it


# ---------------------------------------------------------------- how each is looked for


def _program(kind: str) -> Callable[[], None]:
    return lambda: probing.check(kind)


def _sockhash() -> None:
    os.close(bpf.create_map(bpf.MapType.SOCKHASH, key_bytes=8, value_bytes=8, entries=1))


def _mapped_array() -> None:
    fd = bpf.create_map(
        bpf.MapType.ARRAY, key_bytes=4, value_bytes=8, entries=1, flags=bpf.F_MMAPABLE
    )
    try:
        bpf.map_memory(fd, 8, write=True).close()
    finally:
        os.close(fd)


def _ring_buffer() -> None:
    os.close(bpf.create_map(bpf.MapType.RINGBUF, key_bytes=0, value_bytes=0, entries=4096))


def _btf() -> None:
    btf.field_offsets({"tcp_sock": ("write_seq",)})


def _bpffs() -> None:
    with tempfile.TemporaryDirectory(prefix="pyforwarder-") as directory:
        _run("mount", "-t", "bpf", "bpf", directory)
        try:
            fd = bpf.create_map(bpf.MapType.ARRAY, key_bytes=4, value_bytes=4, entries=1)
            try:
                bpf.pin(fd, Path(directory) / "pf_probe")
            finally:
                os.close(fd)
        finally:
            _run("umount", "--lazy", directory)


def _tcx() -> None:
    with private_network():
        program = probing.load_shortest("sched_cls")
        try:
            lo = socket.if_nametoindex("lo")
            os.close(bpf.link_interface(program, lo, bpf.AttachType.TCX_INGRESS))
        finally:
            os.close(program)


def _clsact() -> None:
    with private_network():
        _run("tc", "qdisc", "add", "dev", "lo", "clsact")


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(errno.EOPNOTSUPP, done.stderr.strip() or f"exit {done.returncode}")


@dataclass(frozen=True, slots=True)
class Capability:
    """One thing that a kernel has or has not; `since`: from which version a host must have it."""

    since: tuple[int, int]
    look: Callable[[], None]  # raises OSError or LoadError if it is not there


# 6.1 is the oldest kernel that the product names, so what it has every host must have.
TABLE: Final = {
    "sockhash": Capability((6, 1), _sockhash),
    "mapped array": Capability((6, 1), _mapped_array),
    "ring buffer": Capability((6, 1), _ring_buffer),
    "BTF": Capability((6, 1), _btf),
    "bpffs": Capability((6, 1), _bpffs),
    "sk_skb": Capability((6, 1), _program("sk_skb")),
    "sched_cls": Capability((6, 1), _program("sched_cls")),
    "map iterators": Capability((6, 1), _program("map_iterator")),
    "socket iterators": Capability((6, 1), _program("socket_iterator")),
    "ksym iterators": Capability((6, 1), _program("ksym_iterator")),
    # The product does without; it tells a host of REFUSALS from others. arm64 has it since 6.4.
    "fentry": Capability((6, 4), _program("fentry")),
    "clsact": Capability((6, 1), _clsact),
    "tcx": Capability((6, 6), _tcx),
}


# ---------------------------------------------------------------- what is known of some hosts


@dataclass(frozen=True, slots=True)
class Refusal:
    """A host that refuses some capabilities as a matter of policy: how it is recognised, exactly.

    `refuses` are all refused with EPERM, to a process with every capability that BPF asks for,
    outside of a user namespace and without a seccomp filter, and though the program has no fault
    that a verifier could find; `grants` are all there.  A host that differs is no such host.
    """

    refuses: frozenset[str]
    grants: frozenset[str]
    lockdown: host.Lockdown


REFUSALS: Final = {
    # Seen on a build of 6.18 that starts in lockdown=integrity. Distributions' kernels do not do
    # this in any lockdown.
    "no map iterators": Refusal(
        refuses=frozenset({"map iterators", "socket iterators", "fentry"}),
        grants=frozenset({"ksym iterators", "sk_skb", "sched_cls", "BTF"}),
        lockdown=host.Lockdown.INTEGRITY,
    ),
    # Seen on another build of it.
    "no fentry": Refusal(
        refuses=frozenset({"fentry"}),
        grants=frozenset(
            {"map iterators", "socket iterators", "ksym iterators", "sk_skb", "sched_cls", "BTF"}
        ),
        lockdown=host.Lockdown.INTEGRITY,
    ),
}


@dataclass(frozen=True, slots=True)
class Host:
    """The capabilities of this host."""

    kernel: tuple[int, int]
    lockdown: host.Lockdown
    errors: dict[str, str]  # of those that are not there, why
    refusal: str  # which of REFUSALS it is, or ""

    def state(self, name: str) -> State:
        """What came of looking for one of `TABLE`."""
        if name not in self.errors:
            return State.PRESENT
        if self.kernel < TABLE[name].since:
            return State.TOO_OLD
        if self.refusal and name in REFUSALS[self.refusal].refuses:
            return State.REFUSED
        return State.MISSING

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return self.state(name) is State.PRESENT

    def excuse(self, name: str) -> str:
        """Why a host like this need not have it; empty if it has it, or must."""
        state = self.state(name)
        if state is State.TOO_OLD:
            since, has = TABLE[name].since, self.kernel
            return f"{name} came with Linux {since[0]}.{since[1]}, this is {has[0]}.{has[1]}"
        if state is State.REFUSED:
            return f"this host is known to refuse {name} ({self.refusal})"
        return ""

    def lines(self) -> list[str]:
        """The head of a test report."""
        there = [name for name in TABLE if self.has(name)]
        lines = [
            f"host: Linux {self.kernel[0]}.{self.kernel[1]}, lockdown {self.lockdown},"
            f" {self.refusal or 'nothing refused'}",
            f"host has: {', '.join(there)}",
        ]
        for name, error in self.errors.items():
            why = self.excuse(name) or f"MISSING: a host with this kernel must have it: {error}"
            lines.append(f"host has no {name}: {why}")
        return lines


@functools.cache
def this_host() -> Host:
    """Look for everything, once per process; needs root."""
    failures: dict[str, OSError | LoadError] = {}
    for name, capability in TABLE.items():
        try:
            capability.look()
        except (OSError, LoadError) as error:
            failures[name] = error
    mode = host.lockdown()
    refusal = next(
        (name for name, known in REFUSALS.items() if _is(known, failures, mode)),
        "",
    )
    return Host(
        host.kernel_version(),
        mode,
        {name: " ".join(str(error).split()) for name, error in failures.items()},
        refusal,
    )


def _is(
    refusal: Refusal, failures: dict[str, OSError | LoadError], lockdown: host.Lockdown
) -> bool:
    return (
        lockdown is refusal.lockdown
        and not host.missing_capabilities(host.Capability)
        and not host.in_user_namespace()
        and not host.has_seccomp_filter()
        and not refusal.grants & failures.keys()
        and all(
            isinstance(error := failures.get(name), OSError) and error.errno == errno.EPERM
            for name in refusal.refuses
        )
    )


def unmet(names: tuple[str, ...]) -> str:
    """The excuse for not running a test that needs these; empty if it has to run.

    Without root nothing is known, and nothing excused.
    """
    if os.geteuid() != 0:
        return ""
    return next((why for name in names if (why := this_host().excuse(name))), "")


def header() -> list[str]:
    """The lines for pytest's head; without root only that nothing was tried."""
    if os.geteuid() != 0:
        return ["host: nothing tried, that needs root"]
    with contextlib.suppress(FileNotFoundError):  # `tc`, `mount`
        return this_host().lines()
    return ["host: nothing tried, that needs iproute2 and mount"]
