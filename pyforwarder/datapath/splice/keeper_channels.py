"""Where workers ask the keeper: of each worker one channel, and behind it those of its successors.

A successor is read from once all is read that those before it have asked. So a request that was
under way as its worker died is obeyed before the successor is told of what that worker had.
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from pyforwarder.datapath.splice import sockets as splice_sockets

RENEWAL: Final = struct.Struct("=I")  # of which worker


class Channels:
    """Of all workers; the sockets are this one's to close."""

    def __init__(
        self,
        poll: select.poll,
        socks: Sequence[Sequence[socket.socket]],
        renewals: socket.socket,
        also: Callable[[int, socket.socket], object] | None = None,
    ) -> None:
        """`socks[n]` are worker n's, the oldest first; by `renewals` come further ones.

        `also` gets the worker and another socket that comes with each of these.

        Those that are to be read are registered with `poll`.
        """
        self._poll = poll
        self._socks = [deque(ends) for ends in socks]
        self._renewals = renewals
        self._also = also
        self._may_renew = True  # the supervisor may say that there is another
        self._workers: dict[int, int] = {}  # descriptor of a channel that is read -> worker
        poll.register(renewals, select.POLLIN)
        self._read_first_ones()

    @property
    def is_over(self) -> bool:
        """Whether no worker can ask any more."""
        return not self._workers

    def worker_of(self, fd: int) -> int | None:
        """Whose channel that is; None: it is none."""
        return self._workers.get(fd)

    def is_renewals(self, fd: int) -> bool:
        """Whether further channels come by that descriptor."""
        return fd == self._renewals.fileno()

    def sock(self, worker: int) -> socket.socket:
        """The channel that is read now."""
        return self._socks[worker][0]

    def renew(self) -> None:
        """Take what has come by `renewals`."""
        while self._may_renew:
            try:
                data, fds, _, _ = socket.recv_fds(self._renewals, RENEWAL.size, 2)
            except BlockingIOError:
                break
            if not data:
                self._may_renew = False
                self._poll.unregister(self._renewals)
                break
            socks = [socket.socket(fileno=fd) for fd in fds]
            if len(socks) < 1 + (self._also is not None):
                for one in socks:
                    one.close()
                continue  # no descriptor was left: the worker's death is told again
            (worker,) = RENEWAL.unpack(data)
            sock = socks[0]
            if self._also is not None:
                self._also(worker, socks.pop())
            for one in socks[1:]:
                one.close()
            known = map(splice_sockets.cookie, self._socks[worker])
            if splice_sockets.cookie(sock) in known:
                sock.close()  # said to the keeper before, and we were begun with it
            else:
                self._socks[worker].append(sock)
        self._read_first_ones()

    def ended(self, fd: int) -> bool:
        """Nothing more comes by that channel: go on with the next one; False: there is none.

        A worker that has died has left another one, which was said before its own was closed. One
        that closes its channel by itself has not.
        """
        worker = self._workers.pop(fd)
        self._poll.unregister(fd)
        self._socks[worker].popleft().close()
        self.renew()
        return bool(self._socks[worker])

    def _read_first_ones(self) -> None:
        """Also of a worker that had none any more: another has come."""
        for worker, socks in enumerate(self._socks):
            if socks and socks[0].fileno() not in self._workers:
                self._poll.register(socks[0], select.POLLIN)
                self._workers[socks[0].fileno()] = worker
