"""The keeper as the supervisor has it: a process that is forked, watched, and started again."""

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
    """The keeper, from fork to wait, and again if it dies."""

    def __init__(
        self,
        maps: SpliceMaps,
        *,
        workers: int,
        close_in_child: Callable[[], None],
        express: Express | None = None,
    ) -> None:
        """Make what it and the workers share; `start` forks it.

        `clients[n]` is worker n's end; `renew` makes that of its replacement.
        """
        self._maps = maps
        self._express = express
        self._close_in_child = close_in_child
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(workers)]
        self.clients = [ours for ours, _ in pairs]
        # Kept for the keeper that comes after one that died; of each worker the oldest first.
        self._ends = [[theirs] for _, theirs in pairs]
        self._renewals, self._renewals_end = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET
        )
        for sock in (self._renewals, self._renewals_end):
            sock.setblocking(False)
        self._pulse = mmap.mmap(-1, PULSE.size)
        self._cookies = mmap.mmap(-1, maps.entries * COOKIES.size)
        # Readable: a byte for each time that a worker has asked for what it may not.
        self.complaints_fd, self._complaints_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # Where other machines' pairs are told of, and their addresses; set before `start`.
        self.standby, self._standby_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.standby_addresses: Sequence[str] = ()
        self._last_pulse = -1
        self._still = 0  # looks at it that found it as it was before
        self.pid = 0

    def start(self) -> None:
        """Fork it, once the programs are attached; it takes over what they have found."""
        self._start(self._maps.found)

    def _start(self, found: Sequence[Found]) -> None:
        self.pid = fork(lambda: self._child(found))

    def _child(self, found: Sequence[Found]) -> int:
        # It ends with us, however we end.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        for ours in (*self.clients, self.standby, self._renewals):
            ours.close()
        # A reader of our output waits for an end of file that the last holder brings.
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
        """Put another in the place of one that died; it knows what that one knew."""
        self._still = 0
        self._start(())

    def renew(self, worker: int) -> None:
        """A worker is gone: make the channel of its successor.

        Who has got the old one from it can neither ask over it any more, nor read what the
        successor is told. All that was asked by then is read before what is asked over the new one.

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
        """The same before the first keeper has begun: what was asked is nobody's.

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
        # Not only our descriptor of it: it ends for all who have one.
        with contextlib.suppress(OSError):
            self.clients[worker].shutdown(socket.SHUT_RDWR)
        self.clients[worker].close()
        self.clients[worker] = ours

    def renewed(self, worker: int) -> None:
        """The keeper has answered over the new channel: it has read all that came by the others."""
        while len(self._ends[worker]) > 1:
            self._ends[worker].pop(0).close()

    def complaints(self) -> set[int]:
        """The workers that have asked for what they may not, since the last call."""
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
        """Whether it has done nothing since the last call but one.

        One such look is not enough: the whole daemon may have been stopped, and the first to go on
        is the one who looks. Call it more seldom than every `PULSE_S`.
        """
        (pulse,) = PULSE.unpack_from(self._pulse)
        self._still = self._still + 1 if self.pid and pulse == self._last_pulse else 0
        self._last_pulse = pulse
        return self._still >= 2

    def kill(self) -> None:
        """End one that hangs; `has_died` tells of it."""
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
        """What the keeper has, too; and where it is told of others."""
        ends = [end for ends in self._ends for end in ends]
        return [*ends, self._standby_end, self._renewals, self._renewals_end]

    def close(self) -> None:
        """End it."""
        for sock in (*self.clients, *self._shared_ends(), self.standby):
            sock.close()
        for fd in (self.complaints_fd, self._complaints_end):
            os.close(fd)
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
