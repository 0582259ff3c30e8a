"""The keeper as a child of the supervisor: forked, watched, and restarted."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.splice.keeper import PULSE, Keeper
from pyforwarder.datapath.splice.keeper_channels import RENEWAL
from pyforwarder.datapath.splice.keeper_client import KeeperError
from pyforwarder.datapath.splice.keeper_pairs import COOKIES
from pyforwarder.runtime.children import fork

if TYPE_CHECKING:
    from pyforwarder.datapath.express.sharing import Express
    from pyforwarder.datapath.splice.maps import SpliceMaps
    from pyforwarder.datapath.splice.pins import Found

_PR_SET_PDEATHSIG: Final = 1


class KeeperProcess:
    """The keeper's process, which is restarted if it dies."""

    def __init__(
        self,
        maps: SpliceMaps,
        *,
        workers: int,
        close_in_child: Callable[[], None],
        express: Express | None = None,
    ) -> None:
        """Create what it shares with the workers; `start` forks it.

        `clients[n]` is worker n's end; `renew` creates that of its replacement.
        """
        self._maps = maps
        self._express = express
        self._close_in_child = close_in_child
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        self.clients = [ours for ours, _ in pairs]
        # Kept for the next keeper, if one dies; of each worker, oldest first.
        self._ends = [[theirs] for _, theirs in pairs]
        self._renewals, self._renewals_end = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        )
        for sock in (self._renewals, self._renewals_end):
            sock.setblocking(False)
        self._pulse = mmap.mmap(-1, PULSE.size)
        self._cookies = mmap.mmap(-1, maps.entries * COOKIES.size)
        # Readable: a byte for each request of a worker that was not allowed.
        self.complaints_fd, self._complaints_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # For reports about other machines' pairs, and their addresses; set before `start`.
        self.standby, self._standby_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.standby_addresses: Sequence[str] = ()
        self._last_pulse = -1
        self._still = 0  # checks in a row that found no progress
        self.pid = 0

    def start(self) -> None:
        """Fork it, once the programs are attached; it continues the pairs that were found."""
        self._start(self._maps.found)

    def _start(self, found: Sequence[Found]) -> None:
        self.pid = fork(lambda: self._child(found))

    def _child(self, found: Sequence[Found]) -> int:
        # It ends with the supervisor, however that ends.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for ours in (*self.clients, self.standby, self._renewals):
            ours.close()
        # A reader of our output waits for end of file, which comes when the last descriptor is
        # closed.
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1):
            os.dup2(null, fd)
        os.close(null)
        self._close_in_child()
        os.close(self.complaints_fd)
        Keeper(
            self._maps,
            self._ends,
            found,
            self._pulse,
            self._cookies,
            self._complaints_end,
            self._renewals_end,
            self._standby_end,
            self.standby_addresses,
            self._express if self._express and self._express.has_begun else None,
        ).serve()
        return 0

    def restart(self) -> None:
        """Start another keeper in place of one that died; it reads the same records."""
        self._still = 0
        self._start(())

    def renew(self, worker: int) -> None:
        """Create the channel of a worker's successor.

        A process that has got the old one from the dead worker can neither send requests over it
        any more, nor read the successor's answers. All requests that were sent by then are read
        before those over the new channel.

        Raises:
            KeeperError: there are no descriptors left, or the keeper reads nothing.
        """
        ours, theirs = self._channel()
        fds = [theirs.fileno()]
        try:
            if self._express is not None:
                fds.append(self._express.renew(worker).fileno())
            socket.send_fds(self._renewals, [RENEWAL.pack(worker)], fds)
        except OSError as error:
            ours.close()
            theirs.close()
            raise KeeperError("renew a worker's channel", error.errno or 0) from error
        self._ends[worker].append(theirs)
        self._put(worker, ours)

    def renew_unread(self, worker: int) -> None:
        """The same before the first keeper has started: unread requests are discarded.

        Raises:
            KeeperError: there are no descriptors left.
        """
        ours, theirs = self._channel()
        try:
            if self._express is not None:
                self._express.renew(worker)
        except OSError as error:
            ours.close()
            theirs.close()
            raise KeeperError("renew a worker's channel", error.errno or 0) from error
        while self._ends[worker]:
            self._ends[worker].pop().close()
        self._ends[worker].append(theirs)
        self._put(worker, ours)

    @staticmethod
    def _channel() -> tuple[socket.socket, socket.socket]:
        try:
            return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise KeeperError("renew a worker's channel", error.errno or 0) from error

    def _put(self, worker: int, ours: socket.socket) -> None:
        # Shut down, and not only closed: so it ends for all processes that have a descriptor.
        with contextlib.suppress(OSError):
            self.clients[worker].shutdown(socket.SHUT_RDWR)
        self.clients[worker].close()
        self.clients[worker] = ours

    def renewed(self, worker: int) -> None:
        """The keeper has answered over the new channel: it has read all of the old ones."""
        while len(self._ends[worker]) > 1:
            self._ends[worker].pop(0).close()

    def complaints(self) -> set[int]:
        """The workers that have sent requests that are not allowed, since the last call."""
        found: set[int] = set()
        with contextlib.suppress(BlockingIOError):
            while said := os.read(self.complaints_fd, 4096):
                found.update(said)
        return found

    def has_died(self) -> bool:
        """Whether it has ended by itself since the last call; reaps it."""
        if not self.pid:
            return False
        pid, _ = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.pid = 0
        return bool(pid)

    def hangs(self) -> bool:
        """Whether it has made no progress since the last call but one.

        One such check is not enough: the whole daemon may have been stopped, and the supervisor be
        the first to continue. Call it less often than every `PULSE_S`.
        """
        (pulse,) = PULSE.unpack_from(self._pulse)
        self._still = self._still + 1 if self.pid and pulse == self._last_pulse else 0
        self._last_pulse = pulse
        return self._still >= 2

    def kill(self) -> None:
        """Kill one that hangs; `has_died` reports that."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)

    def keep_only(self, worker: int) -> None:
        """In a worker: close the ends of all others."""
        for other, sock in enumerate(self.clients):
            if other != worker:
                sock.close()
        for sock in (*self._shared_ends(), self.standby):
            sock.close()
        for fd in (self.complaints_fd, self._complaints_end):
            os.close(fd)
        self._pulse.close()
        self._cookies.close()

    def _shared_ends(self) -> list[socket.socket]:
        """The ends that the keeper has, too, and the one for reports."""
        ends = [end for ends in self._ends for end in ends]
        return [*ends, self._standby_end, self._renewals, self._renewals_end]

    def close(self) -> None:
        """End the keeper."""
        for sock in (*self.clients, *self._shared_ends(), self.standby):
            sock.close()
        for fd in (self.complaints_fd, self._complaints_end):
            os.close(fd)
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
