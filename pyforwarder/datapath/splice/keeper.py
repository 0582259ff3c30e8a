"""The process that begins and ends splices: its event loop, and the channels for requests.

That needs privileges (TCP_REPAIR, BPF_PROG_TEST_RUN) and must be quick, so it is done by neither
the workers nor the supervisor: the keeper is a process of its own that does only this. A worker
sends requests over its own socket, and does not wait for the answer to one that begins a pair. The
keeper does not trust workers: it reads addresses from the sockets that they hand over, never from
their messages, and a worker reaches only splices that it began. What each request does is in
keeper_answers.py and the parts that it calls.

Everything that the keeper knows is in the records, too. So a keeper that died is replaced by one
that reads them, and pairs whose worker or whole daemon died continue, and go to the successor.

No worker waits long for a keeper that hangs: a request has a time until which it must be read, and
is not obeyed later. No pair begins later than soon after that time, which the program that lets it
begin ensures (`control` in splice.c). So from then on the record says whether the pair has begun,
with an answer of the keeper or without. The supervisor replaces a keeper that hangs.
"""

from __future__ import annotations

import array
import contextlib
import json
import math
import mmap
import os
import select
import socket
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.ebpf import syscall as bpf
from pyforwarder.datapath.ebpf.abi import PAIR_BYTES, PairRecord
from pyforwarder.datapath.express.keeping import ExpressKeeper
from pyforwarder.datapath.splice.abi import HELD, NO_SLOT, ResetBy, SpliceState
from pyforwarder.datapath.splice.keepalive import Keepalives
from pyforwarder.datapath.splice.keeper_adoption import KeeperAdoption
from pyforwarder.datapath.splice.keeper_answers import Answers
from pyforwarder.datapath.splice.keeper_channels import Channels
from pyforwarder.datapath.splice.keeper_client import MOST_MESSAGE_BYTES
from pyforwarder.datapath.splice.keeper_joining import Joining
from pyforwarder.datapath.splice.keeper_pairs import KeeperPairs
from pyforwarder.datapath.splice.keeper_replies import Failed, Late, NotYoursError
from pyforwarder.datapath.splice.keeper_requests import FaultyRequestError, understand
from pyforwarder.datapath.splice.records import WORKER_AT, forget_flows, shown_of
from pyforwarder.datapath.splice.rerouting import Rerouting
from pyforwarder.datapath.splice.session_keeper import SessionKeeper
from pyforwarder.datapath.splice.standby import Standby
from pyforwarder.datapath.splice.standby_requests import FaultyStandbyError
from pyforwarder.runtime.descriptors import close_given, duplicate_socket

if TYPE_CHECKING:
    from pyforwarder.datapath.express.sharing import Express
    from pyforwarder.datapath.splice.maps import SpliceMaps
    from pyforwarder.datapath.splice.pins import Found

# The pulse grows at least this often.
PULSE_S: Final = 1.0
PULSE: Final = struct.Struct("=I")


class Keeper:
    """The keeper's process: serves until all clients are gone or it is killed."""

    def __init__(
        self,
        maps: SpliceMaps,
        socks: Sequence[Sequence[socket.socket]],
        found: Sequence[Found],
        pulse: mmap.mmap,
        cookies: mmap.mmap,
        complaints_fd: int,
        renewals: socket.socket,
        standby_sock: socket.socket | None = None,
        standby_addresses: Sequence[str] = (),
        express: Express | None = None,
    ) -> None:
        """`socks[n]` are the channels of worker n and of its predecessors, oldest first.

        Further ones come by `renewals`. `found` are the pairs of an earlier daemon that continue.
        `pulse` is a number that grows as long as this works; `cookies` are those of every pair's
        sockets, for the next keeper. If a worker sends a request that is not allowed, its number is
        written to `complaints_fd`, one byte each time. Requests about pairs of other machines come
        by `standby_sock`; such pairs come here if `standby_addresses` do.
        """
        self._poll = select.poll()
        self._channels = Channels(
            self._poll, socks, renewals, express.renewed if express is not None else None
        )
        self._pulse = pulse
        self._complaints_fd = complaints_fd
        self._standby_sock = standby_sock
        first_place = express.connections.first_splice if express else maps.entries
        self._pairs = KeeperPairs(maps, cookies, first_place=first_place)
        memory = self._pairs.memory
        table = bpf.map_memory(maps.pairs_fd, maps.workers * maps.slots * PAIR_BYTES, write=False)
        self._table = table
        self._sessions = SessionKeeper(
            maps.sessions, maps.links, workers=maps.workers, slots=maps.slots, pairs=table
        )
        self._keepalives = Keepalives(memory, self._pairs.end)
        self._rerouting = Rerouting(maps.links, memory, self._pairs.owned, self._pairs.end)
        self._adoption = KeeperAdoption(
            self._pairs,
            table,
            self._rerouting,
            workers=maps.workers,
            sockets_of=lambda index: self._standby.sockets_of(index),
        )
        self._standby = Standby(
            _StandbyOwner(self._pairs, self._adoption),
            memory,
            self._pairs.flows,
            maps.links,
            self._keepalives,
            addresses=standby_addresses,
            most=maps.entries // 2,
            ports_held=express.connections.places if express is not None else 0,
        )
        self._pairs.when_forgotten.append(self._standby.forgotten)
        self._express: ExpressKeeper | None = None
        if express is not None:
            self._express = ExpressKeeper(
                express,
                memory,
                _ExpressOwner(self._adoption, self._keepalives),
                workers=maps.workers,
            )
            self._adoption.express = self._express
            self._pairs.free_place = self._express.freed
            self._pairs.word_of_place = self._express.word_of
            self._express.begin(self._pairs.found.__contains__)
        self._answers = Answers(
            self._pairs,
            Joining(maps, self._pairs, self._keepalives),
            self._adoption,
            self._sessions,
            self._express,
            is_away=self._standby.is_away,
            slots=maps.slots,
        )
        # Some of these may have ended since they were found.
        self._resume_pairs({one.index: one.record for one in found}, workers=maps.workers)

    def _resume_pairs(self, said_of: dict[int, bytes], *, workers: int) -> None:
        """Continue the pairs of the previous keeper, from the records."""
        for index in sorted(self._pairs.found):
            record = self._pairs.record(index)
            if self._express is not None and self._express.owns(index, record):
                continue  # it was not reported to a worker yet
            if record.worker == HELD:
                self._pairs.forget(index)  # it will be reported again
            elif record.state == SpliceState.RESET:
                self._pairs.linger_reset(index)
            elif record.state != SpliceState.ACTIVE:
                self._pairs.forget(index)  # its worker has given up before it began
            elif not record.id:
                self._pairs.linger(index)
            else:
                self._pairs.owners[index] = worker = record.worker % workers
                self._pairs.store(index, WORKER_AT, worker)
                if self._express is not None:
                    self._express.adopted(index, worker, has_it=record.slot != NO_SLOT)
                if index in said_of:
                    self._adoption.orphan(index, said_of[index])
                elif record.slot == NO_SLOT:  # an earlier keeper had not given it to a worker yet
                    shown = self._express.said(index) if self._express else b""
                    shown = shown or shown_of(self._table, record, len(self._table) // PAIR_BYTES)
                    self._adoption.orphan(index, shown)
                self._standby.unsettled(index, record)
        self._keepalives.watch(self._pairs.owned())

    def serve(self) -> None:
        """Serve until every worker's end is closed."""
        poll = self._poll
        poll.register(self._rerouting, select.POLLIN)
        if self._standby_sock is not None and self._standby.is_wanted:
            poll.register(self._standby_sock, select.POLLIN)
        if self._express is not None:
            poll.register(self._express.wake_fd, select.POLLIN)
        while not self._channels.is_over:
            wait_s = self._sessions.wait_s(self._keepalives.wait_s(self._rerouting.wait_s(PULSE_S)))
            wait_s = self._standby.wait_s(self._pairs.ports.wait_s(wait_s))
            if self._express is not None:
                wait_s = self._express.wait_s(wait_s)
            for fd, mask in poll.poll(math.ceil(wait_s * 1000)):
                if fd == self._rerouting.fileno():
                    self._rerouting.changed()
                    self._sessions.routes_changed()
                    self._standby.routes_changed()
                    if self._express is not None:
                        self._express.routes_changed()
                elif self._express is not None and fd == self._express.wake_fd:
                    self._express.woken()
                elif self._channels.is_renewals(fd):
                    self._channels.renew()
                elif (worker := self._channels.worker_of(fd)) is not None:
                    if not self._answer(worker, mask) and not self._channels.ended(fd):
                        self._complain(worker, FaultyRequestError("it has closed its channel"))
                elif not self._answer_standby():
                    poll.unregister(fd)
            now_s = time.monotonic()
            self._pairs.forget_due(now_s)
            self._pairs.ports.run_due(now_s)
            self._sessions.run_due(now_s)
            self._rerouting.run_due()
            self._standby.run_due()
            if self._express is not None:
                self._express.go_on()
                for worker in self._express.closed():
                    self._complain(worker, FaultyRequestError("it has closed its socket"))
            self._keepalives.run_due()
            (number,) = PULSE.unpack_from(self._pulse)
            PULSE.pack_into(self._pulse, 0, number + 1)

    def _answer(self, worker: int, mask: int) -> bool:
        """Serve one request; False once the worker's end is closed for good."""
        sock = self._channels.sock(worker)
        try:
            data, fds, flags, _ = socket.recv_fds(sock, MOST_MESSAGE_BYTES, 4)
        except ConnectionResetError:
            # Its worker has died before it had read all answers. Its requests come next
            # (__skb_try_recv_datagram reports the error first, and once).
            return True
        except OSError:
            return False
        if not data and mask & select.POLLHUP:
            return False
        sockets: list[socket.socket] = []
        given: list[socket.socket] = []
        try:
            if flags & socket.MSG_TRUNC:
                raise FaultyRequestError("too long")
            request = understand(data, len(fds))
            answer: dict[str, object] = {"n": request["n"]}
            try:
                sockets.extend(duplicate_socket(fd) for fd in fds)
                # Checked only now, after it was read: a worker may give a request up that it finds
                # unread.
                if time.monotonic() > request["until"]:
                    answer |= Late().words()
                else:
                    answer.update(self._answers.answer(worker, request, sockets, given))
            except (OSError, ValueError, NotYoursError) as error:
                answer |= Failed.by(error).words()
            rights = array.array("i", [one.fileno() for one in given])
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if given else []
            # A worker that reads no answers must not keep the others waiting.
            try:
                sock.sendmsg([json.dumps(answer).encode()], control, socket.MSG_DONTWAIT)
            except OSError:
                self._take_back(worker, request["do"], answer.get("index"))
        except Exception as error:
            # Every error during a request is its sender's fault, and must not affect other workers.
            self._complain(worker, error)
        finally:
            for one in (*sockets, *given):
                one.close()
            close_given(fds)
        return True

    def _take_back(self, worker: int, do: str, index: object) -> None:
        """A worker did not get its answer: what was in it is given when it asks again."""
        if not isinstance(index, int):
            return
        if do == "adopt":
            self._adoption.take_back(index)
        elif do == "adopt_session":
            self._sessions.take_back(worker, index)

    def _answer_standby(self) -> bool:
        """Serve the process that reports other machines' pairs; False once it is gone."""
        sock = self._standby_sock
        assert sock is not None
        try:
            data, fds, flags, _ = socket.recv_fds(sock, MOST_MESSAGE_BYTES, 4)
        except OSError:
            return False
        close_given(fds)
        if not data:
            return False
        try:
            if fds or flags & socket.MSG_TRUNC:
                raise FaultyStandbyError("too much")
            answer = self._standby.answer(data)
        except FaultyStandbyError as error:
            answer = {"fault": str(error)}
        except (OSError, ValueError):
            traceback.print_exc(file=sys.stderr)
            answer = {"fault": "it failed"}
        with contextlib.suppress(OSError):
            sock.sendmsg([json.dumps(answer).encode()], [], socket.MSG_DONTWAIT)
        return True

    def _complain(self, worker: int, error: Exception) -> None:
        """Have the supervisor replace a worker that has sent a request that is not allowed."""
        if not isinstance(error, FaultyRequestError):
            traceback.print_exc(file=sys.stderr)
        # If the pipe is full, there are unread complaints enough.
        with contextlib.suppress(OSError):
            os.write(self._complaints_fd, bytes([worker]))


class _StandbyOwner:
    """The parts of the keeper that `Standby` may use."""

    def __init__(self, pairs: KeeperPairs, adoption: KeeperAdoption) -> None:
        self._pairs = pairs
        self._adoption = adoption
        self.allocate = pairs.allocate
        self.show = pairs.show_held
        self.forget = pairs.forget
        self.end = pairs.end
        self.remember_joined = pairs.remember_joined
        self.take_in = adoption.take_in

    def owns(self, index: int) -> bool:
        """Whether a worker has the pair, or will adopt it."""
        return index in self._pairs.owners

    def give_way(self, index: int, since_s: float) -> bool:
        """Delete the flows of a record whose addresses another machine has, if no pair needs them.

        A pair of a worker that is older than `since_s` (CLOCK_MONOTONIC) ends here without a
        packet: one of its ends has another connection from these ports by now. False: it is
        younger, another machine's pair, or one that a worker will have.
        """
        record = self._pairs.record(index)
        if self.owns(index):
            shown = self._adoption.shown_of(index, record)
            if not shown or PairRecord.from_buffer_copy(shown).started_ns / 1e9 > since_s:
                return False
            self.release(index)
            return True
        if record.id:
            return False
        # It has ended, and lingers, or its place rests.
        forget_flows(self._pairs.flows, index, record)
        return True

    def release(self, index: int) -> None:
        """The pair goes through another machine: release it, without a packet to its ends."""
        forget_flows(self._pairs.flows, index, self._pairs.record(index))
        if self._adoption.is_orphan(index):
            self._pairs.forget(index)
        else:
            self._pairs.end(index, ResetBy.MOVED)


class _ExpressOwner:
    """The parts of the keeper that `ExpressKeeper` may use."""

    def __init__(self, adoption: KeeperAdoption, keepalives: Keepalives) -> None:
        self._keepalives = keepalives
        self.take_in = adoption.take_in

    def keep_alive(self, index: int) -> None:
        """Start keepalives to the pair's peers, if they are configured."""
        self._keepalives.watch([index])
