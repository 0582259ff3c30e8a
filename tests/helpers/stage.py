"""A stage for plays with a datapath: a rig, and a look afterwards at what was left in use."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES
from pyforwarder.datapath.ebpf.pair_table import PairTable, PairWindow
from pyforwarder.datapath.proof.rig import Rig
from pyforwarder.datapath.proof.scenarios import SLOW_LIMIT_BYTES
from pyforwarder.datapath.sockmap.datapath import SockmapDatapath
from pyforwarder.datapath.splice.datapath import SpliceDatapath
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.splicing import Splicing
from tests.helpers.fake_datapath import FakeDatapath
from tests.helpers.waiting import DEADLINE_S

if TYPE_CHECKING:
    import pytest

    from pyforwarder.datapath.sockmap.maps import KernelMaps

SLOTS: Final = 16


def keys_in(fd: int) -> int:
    """How many elements a map with 8-byte keys has."""
    return len(bpf.Map(fd, key_bytes=8, value_bytes=8).all_keys())


def open_fds() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def sockmap_of(rig: Rig) -> SockmapDatapath:
    """The datapath of a stage for sockmap."""
    assert isinstance(rig.datapath, SockmapDatapath)
    return rig.datapath


@contextlib.contextmanager
def stage(name: str, maps: KernelMaps, splicing: Splicing | None = None) -> Iterator[Rig]:
    """A rig with the named datapath; afterwards nothing may be left in use.

    `maps` are made for one worker with `SLOTS` slots.
    """
    gc.collect()  # what earlier tests have left is not counted
    fds_before = open_fds()
    if name in ("sockmap", "splice"):
        window = PairTable(workers=1, slots=SLOTS, fd=maps.pairs_fd).take_window(0)
    else:
        window = PairWindow(mmap.mmap(-1, SLOTS * PAIR_BYTES), first_slot=0, worker_index=0)
    rig = Rig(window)
    sockmap: SockmapDatapath | None = None
    splice: SpliceDatapath | None = None
    if name == "sockmap":
        rig.datapath = sockmap = maps.datapath(rig, window, 0)
        sockmap.limit_bytes = SLOW_LIMIT_BYTES
    elif name == "splice":
        assert splicing is not None
        rig.datapath = splice = SpliceDatapath(
            rig, splicing.maps, splicing.asker(0, rig.loop), window=window, worker=0
        )
    elif name == "fake":
        rig.datapath = FakeDatapath(rig)
    try:
        yield rig
        # What a pair took it has given back by itself, when it ended.
        rig.loop.run_once(0)
        assert splice is None or splice._keeper.finish(DEADLINE_S)
        assert keys_in(maps.of[0].owners_fd) == 0
        assert keys_in(maps.of[0].sockets_fd) == 0
        assert len(window._free) == SLOTS
        assert rig.loop.deadlines.next_s() is None
        assert sockmap is None or sockmap._by_slot == {}
        assert splice is None or splice._by_index == {}
    finally:
        rig.close()
        if sockmap is not None:
            sockmap._ring.close()
        if splice is not None:
            splice.close()
        window.close()
    assert open_fds() == fds_before


@contextlib.contextmanager
def stage_with_keeper(
    maps: KernelMaps, patch: pytest.MonkeyPatch, where: object, name: str, by: Callable[..., Any]
) -> Iterator[Rig]:
    """A stage for splice whose keeper, a process of its own, has `by` in that place."""
    with patch.context() as patched:
        patched.setattr(where, name, by)
        loaded = SpliceMaps.load(workers=1, slots=SLOTS, pairs_fd=maps.pairs_fd)
        splicing = Splicing(loaded, workers=1)  # its keeper is forked now
    with contextlib.closing(splicing):
        splicing.patient_client(0).ask("adopt")  # it has begun to serve
        with stage("splice", maps, splicing) as rig:
            yield rig
