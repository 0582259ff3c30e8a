"""A kernel that is locked down so far that no program may read its memory (confidentiality).

No kernel of a test can be: that would last until it is booted again. So what it refuses then is
refused here: to load a program that sees packets and calls bpf_probe_read_kernel
(bpf_base_func_proto, kernel/bpf/helpers.c).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import pytest

from pyforwarder.datapath.ebpf import probing
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.express.connection_maps import PROGRAMS
from pyforwarder.datapath.proof.apart import (
    prove_express_apart,
    prove_sessions_apart,
    prove_splice_apart,
)
from pyforwarder.datapath.splice.maps import Programs
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from pyforwarder.datapath.proof.selftest import Proof

# struct bpf_insn of a call (BPF_JMP | BPF_CALL), and the helper's number (uapi/linux/bpf.h).
INSTRUCTION: Final = struct.Struct("=BBhi")
CALL: Final = 0x85
READ_KERNEL: Final = 113


def reads_kernel(code: bytes) -> bool:
    """Whether a program calls that helper."""
    return any(
        (operation, registers, number) == (CALL, 0, READ_KERNEL)
        for operation, registers, _, number in INSTRUCTION.iter_unpack(code)
    )


@dataclass(slots=True)
class Locked:
    """What it was asked to load, by name."""

    loaded: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Locked:
    asked = Locked()
    load = bpf.load_program

    def load_program(kind: bpf.ProgramType, code: bytes, **more: Any) -> int:
        name = more.get("name", "pf_probe")
        if kind == bpf.ProgramType.SCHED_CLS and reads_kernel(code):
            asked.refused.add(name)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        asked.loaded.add(name)
        return load(kind, code, **more)

    monkeypatch.setattr(bpf, "load_program", load_program)
    return asked


@pytest.mark.timeout(scaled_s(120))
@pytest.mark.parametrize(
    ("prove", "programs"),
    [
        (prove_splice_apart, Programs._fields),
        (prove_sessions_apart, Programs._fields),
        (prove_express_apart, (*Programs._fields, *PROGRAMS)),
    ],
)
def test_programs_do_without_and_bytes_are_exact(
    locked: Locked, prove: Callable[[str | None], Proof], programs: tuple[str, ...]
) -> None:
    """On `lo` all packets come with checksums that are still to be made, as those of guests."""
    assert not probing.reads_kernel()
    proof = prove("nobody")
    assert (proof.passed, proof.reason) == (True, "")
    assert set(programs) <= locked.loaded
    assert locked.refused == {"pf_probe"}


@pytest.mark.timeout(scaled_s(60))
def test_the_same_programs_with_the_check_would_be_refused(
    locked: Locked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "reads_kernel", lambda: True)
    assert not prove_splice_apart("nobody").passed
    assert "ingress" in locked.refused
