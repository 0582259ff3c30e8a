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

# BPF_MOV64_IMM(BPF_REG_0, 0), BPF_EXIT_INSN() (include/linux/filter.h)
_RETURN_0: Final = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)


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
