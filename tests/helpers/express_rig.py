"""A rig whose pairs the kernel has opened: the plays of every datapath, for express.

A client has said its first bytes when a play begins, and its server has read them. The worker's
part begins when the keeper tells of a pair: of one that lasts a second, or was reset, which is
adopted then, in the middle of the play; or of one that has ended before.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from pyforwarder.datapath.ebpf.arrays import create_pairs
from pyforwarder.datapath.ebpf.pair_table import PairTable
from pyforwarder.datapath.express import keeping
from pyforwarder.datapath.proof.express import Stage
from pyforwarder.datapath.proof.rig import SMALL_BUFFER_BYTES, Rig, RigError, RigPair
from pyforwarder.datapath.splice.datapath import SpliceDatapath
from pyforwarder.datapath.splice.maps import SpliceMaps
from pyforwarder.datapath.splice.splicing import Splicing
from pyforwarder.datapath.splice.supervised import make_express
from pyforwarder.runtime.loop import EPOLLIN
from tests.helpers.stage import open_fds
from tests.helpers.waiting import DEADLINE_S

if TYPE_CHECKING:
    from pyforwarder.datapath.base import PairReason
    from pyforwarder.datapath.ebpf.pair_table import PairWindow
    from pyforwarder.datapath.splice.adopted import Orphan

SLOTS: Final = 64
_MOST_MESSAGE_BYTES: Final = 1 << 16
_AGAIN_S: Final = 0.05


class Expressing(NamedTuple):
    """What the rigs of a module share."""

    splicing: Splicing
    stage: Stage
    pairs_fd: int
    lasts: bool


class ExpressPair(RigPair):
    """Of the kernel so far: what comes by in the middle is seen at the other end alone."""

    __slots__ = ()

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        super().__init__(server, client)

    def take(self, orphan: Orphan) -> None:
        """It has sockets of ours from here on."""
        self._client, self.client_fd = orphan.client, orphan.client.fileno()
        self.up.source_fd = self.down.target_fd = self.client_fd
        self.attach_server(orphan.server, orphan.server.fileno())
        self.id = orphan.id


class ExpressRig(Rig):
    """The worker of a host whose connections the kernel opens."""

    def __init__(
        self, window: PairWindow, splicing: Splicing, stage: Stage, *, lasts: bool
    ) -> None:
        """`lasts`: where a play hands a pair over, it waits until the pair is adopted."""
        super().__init__(window)
        self._lasts = lasts
        assert splicing.express is not None
        self._express, self._stage = splicing.express, stage
        self.splice = SpliceDatapath(
            self, splicing.maps, splicing.asker(0, self.loop), window=window, worker=0
        )
        self._by_port: dict[int, ExpressPair] = {}
        self._told = self._express.workers[0]
        self.loop.watch(self._told.fileno(), EPOLLIN, self._heard, None)

    def connect(
        self, *, small_buffers: bool = False
    ) -> tuple[socket.socket, RigPair, socket.socket]:
        """A client, the pair between, and a server, which the kernel has connected."""
        client, server = self._opened()
        self._sockets += [client, server]
        if small_buffers:
            for sock in (client, server):
                for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                    sock.setsockopt(socket.SOL_SOCKET, option, SMALL_BUFFER_BYTES)
        pair = ExpressPair(client, server)
        self._by_port[client.getsockname()[1]] = pair
        self._pairs.append(pair)
        return client, pair, server

    def _opened(self) -> tuple[socket.socket, socket.socket]:
        try:
            return self._stage.taken()
        except RigError:  # what is known of the way to a server is forgotten after a minute
            self._stage.left_alone()
            return self._stage.taken()

    def copy(self, pair: RigPair) -> None:
        """It is the kernel's from the beginning."""

    def hand_over(self, pair: RigPair) -> PairReason | None:
        """Likewise; or it gets sockets of ours now."""
        if self._lasts:
            self.run_until(lambda: pair.ended or pair.datapath is not None, "adoption")
        return None

    def run_until(self, done: Callable[[], bool], what: str) -> None:
        """Serve until `done`; the keeper looks more often than it does otherwise."""

        def look() -> bool:
            self._express.wake()
            return done()

        super().run_until(look, what)

    def _heard(self, _owner: object, _fd: int, _mask: int) -> None:
        while True:
            try:
                said = json.loads(self._told.recv(_MOST_MESSAGE_BYTES))
            except BlockingIOError:
                return
            for ended in said["ended"]:
                pair = self._by_port.pop(ended[2][0][1], None)
                if pair is not None:
                    pair.ended = True
            if said["adopt"]:
                self._adopt()

    def _adopt(self) -> None:
        def later() -> None:
            self.loop.after(_AGAIN_S, self._adopt)

        self.splice.adopt(self._take, lambda: None, later)

    def _take(self, orphan: Orphan) -> None:
        pair = self._by_port.pop(orphan.client.getpeername()[1], None)
        if pair is None:  # of a play that is over
            self.splice.forget(orphan.index, orphan.id)
            orphan.client.close()
            orphan.server.close()
            return
        pair.take(orphan)
        pair.slot = self.window.allocate()
        for fd in (pair.client_fd, pair.server_fd):
            self.loop.watch(fd, 0, self.splice.ready, pair)
        pair.datapath = self.splice
        self.splice.resume(pair, orphan)

    def _end(self, pair: RigPair, *, orderly: bool) -> None:
        if pair.datapath is None:
            pair.ended = True
        else:
            super()._end(pair, orderly=orderly)

    def close(self) -> None:
        """The same; the socket that tells of pairs is another's."""
        self.loop.forget(self._told.fileno())
        super().close()


@contextlib.contextmanager
def expressing(*, lasts: bool) -> Iterator[Expressing]:
    """Programs, keeper, a listener and a server; `lasts`: a pair does so from the beginning."""
    with contextlib.ExitStack() as opened:
        if lasts:  # the keeper, which is forked, has it so
            patch = opened.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(keeping, "LASTS_AFTER_S", 0.0)
        pairs_fd = create_pairs(SLOTS)
        opened.callback(os.close, pairs_fd)
        maps = SpliceMaps.create(workers=1, slots=SLOTS, pairs_fd=pairs_fd, places=2 * SLOTS)
        express = make_express(maps, SLOTS, workers=1)
        programs = maps.load_programs(express.connections)
        express.connections.begin(express.connections.load(maps))
        express.has_begun = True
        splicing = Splicing(maps, workers=1, express=express)
        opened.callback(splicing.close)
        splicing.begin(programs)
        stage = opened.enter_context(contextlib.closing(Stage(splicing, "127.0.0.1")))
        stage.left_alone()
        yield Expressing(splicing, stage, pairs_fd, lasts)


@contextlib.contextmanager
def express_stage(made: Expressing) -> Iterator[ExpressRig]:
    """A rig; afterwards nothing may be left in use."""
    gc.collect()
    fds_before = open_fds()
    window = PairTable(workers=1, slots=SLOTS, fd=made.pairs_fd).take_window(0)
    rig = ExpressRig(window, made.splicing, made.stage, lasts=made.lasts)
    try:
        yield rig
        rig.loop.run_once(0)
        assert rig.splice._keeper.finish(DEADLINE_S)
        assert len(window._free) == SLOTS
        assert rig.loop.deadlines.next_s() is None
        assert rig.splice._by_index == {}
    finally:
        rig.close()
        rig.splice.close()
        window.close()
    gc.collect()
    assert open_fds() == fds_before
