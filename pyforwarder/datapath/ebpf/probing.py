"""Ask the kernel whether it takes a kind of program at all: two instructions, loaded and released.

What a real program is refused for may be its own fault; what this one is refused for never is.
No compiler is needed, so an answer takes milliseconds (iterators: some 30 for the kernel's BTF).
"""

from __future__ import annotations

import os
import struct
from typing import Final, NamedTuple

from pyforwarder.datapath.ebpf import btf
from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.syscall import AttachType, ProgramType

_INSTRUCTION: Final = struct.Struct("=BBhi")
# BPF_MOV64_IMM(BPF_REG_0, 0), BPF_EXIT_INSN() (include/linux/filter.h)
_RETURN_0: Final = _INSTRUCTION.pack(0xB7, 0, 0, 0) + _INSTRUCTION.pack(0x95, 0, 0, 0)
# bpf_probe_read_kernel(r10 - 8, 8, 0)
_READ_KERNEL: Final = b"".join(
    (
        _INSTRUCTION.pack(0xBF, 0xA1, 0, 0),  # BPF_MOV64_REG(BPF_REG_1, BPF_REG_10)
        _INSTRUCTION.pack(0x07, 1, 0, -8),  # BPF_ALU64_IMM(BPF_ADD, BPF_REG_1, -8)
        _INSTRUCTION.pack(0xB7, 2, 0, 8),
        _INSTRUCTION.pack(0xB7, 3, 0, 0),
        _INSTRUCTION.pack(0x85, 0, 0, 113),  # BPF_CALL
    )
)


class Kind(NamedTuple):
    """What one kind of program is to bpf(2)."""

    type: ProgramType
    since: tuple[int, int]  # the kernel version that brought it
    function: str = ""  # of the kernel, for tracing programs: the place in BTF
    attach_type: AttachType | None = None


def _iterator(target: str, since: tuple[int, int]) -> Kind:
    return Kind(ProgramType.TRACING, since, f"bpf_iter_{target}", AttachType.TRACE_ITER)


KINDS: Final = {
    "sk_skb": Kind(ProgramType.SK_SKB, (4, 14)),
    "sched_cls": Kind(ProgramType.SCHED_CLS, (4, 1)),
    "map_iterator": _iterator("bpf_map_elem", (5, 9)),
    "socket_iterator": _iterator("sockmap", (5, 10)),
    "ksym_iterator": _iterator("ksym", (6, 0)),
    "tcp_iterator": _iterator("tcp", (5, 9)),
    "fentry": Kind(ProgramType.TRACING, (5, 5), "tcp_sendmsg", AttachType.TRACE_FENTRY),
}


def load_shortest(kind: str) -> int:
    """The shortest program of one of `KINDS`; the caller closes the descriptor.

    Raises:
        OSError: the kernel refuses it; the errno is the kernel's.
        LoadError: the kernel's BTF has no such place, or there is none.
    """
    wanted = KINDS[kind]
    return bpf.load_program(
        wanted.type,
        _RETURN_0,
        attach_type=wanted.attach_type,
        attach_btf_id=btf.function_id(wanted.function) if wanted.function else 0,
    )


def check(kind: str) -> None:
    """Nothing, if the kernel takes programs of this kind; raises what `load_shortest` does."""
    os.close(load_shortest(kind))


def reads_kernel() -> bool:
    """Whether programs on packets may read the kernel's memory: not if it is locked down for that.

    False, too, where no such program loads for any other reason.
    """
    try:
        fd = bpf.load_program(KINDS["sched_cls"].type, _READ_KERNEL + _RETURN_0)
    except OSError:
        return False
    os.close(fd)
    return True
