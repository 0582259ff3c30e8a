"""A test's own program at an interface, in front of all that is there besides."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.attach import choice as attaching
from pyforwarder.datapath.attach.clsact import ClsactAttacher
from pyforwarder.datapath.ebpf import syscall as bpf

if TYPE_CHECKING:
    from pyforwarder.datapath.attach.base import Side
    from tests.helpers.netns import Network

_TCX: Final = {"in": bpf.AttachType.TCX_INGRESS, "out": bpf.AttachType.TCX_EGRESS}


@contextlib.contextmanager
def first_at(program_fd: int, *places: tuple[Network, str, Side]) -> Iterator[None]:
    """Run the program at these interfaces until the end of the block."""
    with contextlib.ExitStack() as stack:
        for network, interface, side in places:
            stack.enter_context(_first_at(program_fd, network, interface, side))
        yield


@contextlib.contextmanager
def _first_at(program_fd: int, network: Network, interface: str, side: Side) -> Iterator[None]:
    with network.entered():
        index = socket.if_nametoindex(interface)
        if attaching.kind() == "tcx":
            link = bpf.link_interface(program_fd, index, _TCX[side], first=True)
            take_off: Callable[[], None] = partial(os.close, link)
        else:  # of filters with the same priority the last one is the first
            attacher = ClsactAttacher(None)
            attacher.attach(program_fd, index, side)
            take_off = attacher.close
    try:
        yield
    finally:
        with network.entered():
            take_off()
