"""When a joined pair leaves userspace, and for which datapath.

A handover costs some map insertions, so a pair earns it first: by bytes, by round trips or by age
(`handover:` in the configuration). A datapath that was named (`datapath: sockmap`) takes over at
once.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import Address
from pyforwarder.core.connection import Life
from pyforwarder.core.datapaths import IN_KERNEL
from pyforwarder.datapath.base import PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.datapath.splice.paused_pair import PausedPair
from pyforwarder.runtime.counters import Counter
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.worker.client import KeeperWait
from pyforwarder.worker.foreign_sockets import is_plain_tcp

if TYPE_CHECKING:
    from pyforwarder.datapath.base import Flow, Pair
    from pyforwarder.datapath.sockmap.datapath import SockmapDatapath
    from pyforwarder.datapath.splice.datapath import SpliceDatapath
    from pyforwarder.worker.client import Client
    from pyforwarder.worker.host import Host


# Plain names and numbers: every pair asks.
_AF_UNIX: Final = int(socket.AF_UNIX)
_SHORT: Final = PairReason.SHORT
_NOT_AVAILABLE: Final = PairReason.NOT_AVAILABLE
_JOINED: Final = {kind: int(Counter[f"JOINED_{kind.name}"]) for kind in DatapathKind if kind}
_JOINED_COPY: Final = _JOINED[DatapathKind.COPY]
# What a configuration may say where a pair is to be handed over, and not only if that pays; and
# where the keeper may be asked for it.
_NAMED: Final = frozenset(row.name for row in IN_KERNEL)
_BY_KEEPER: Final = frozenset({"auto", *(row.name for row in IN_KERNEL if row.asks_keeper)})

# A pair is likely to be handed over once it has carried this part of what it takes: early enough,
# by default, for the kernel not to have made its sockets' receive buffers larger.
_LIKELY: Final = 16

# A pair that was not ready to be spliced is tried again so long afterwards, if not before.
_AGAIN_S: Final = 0.05

# A pair for which the splice keeper did not answer is asked for again after so long each time, and
# copied meanwhile: a keeper that hangs is replaced within some seconds.
_KEEPER_PAUSES_S: Final = (1.0, 2.0, 4.0, 8.0)
# A server is shown to the keeper so often, as long as connections to it come by us.
_SHOW_AGAIN_S: Final = 1.0
_MOST_SHOWN: Final = 4096
# All that waited for a keeper, or for what is known of datapaths, may be due at once. So many are
# asked for in one turn of the loop.
_MOST_IN_A_TURN: Final = 8

# What keeps a pair from every kernel datapath; with any other reason the next best is asked.
_FINAL: Final = (None, PairReason.UNREAD_BYTES, PairReason.UNIX_SOCKET, PairReason.HALF_CLOSED)


class Handover:
    """Moves pairs from copy to a kernel datapath."""

    def __init__(
        self,
        host: Host,
        sockmap: SockmapDatapath | None,
        splice: SpliceDatapath | None = None,
    ) -> None:
        """Take the kernel's datapaths; None: this host cannot run it, or it is not configured.

        Whether they work is not known before `settle`: until then pairs are copied, and those that
        would be handed over wait for it.
        """
        self._host = host
        self._is_settled = False
        self._is_express = False  # the kernel may open connections
        self._sockmap = sockmap
        self._splice = splice
        self._again: set[Client] = set()  # who is asked again by the clock
        self._queue: dict[Client, None] = {}  # the keeper is asked for them when it has answered
        # Servers that were shown to the keeper, each with its upstream's source: until when.
        self._shown: dict[tuple[Address, str], float] = {}
        self._due: deque[Client] = deque()  # have waited for the keeper, and are asked for again

    def settle(self, *, sockmap: bool, splice: bool, express: bool = False) -> None:
        """Note which datapaths work, and hand over the pairs that waited for that."""
        self._is_express = express and splice
        if not sockmap:
            self._sockmap = None
        if not splice:
            self._splice = None
        if self._is_settled:
            return  # it was known before: nobody waits for that
        self._is_settled = True
        for client in self._host.clients.values():
            if client.waits_for_handover and client.handover_asked:
                self.is_due(client)

    def stop(self) -> None:
        """Give nothing more to the kernel: pairs are copied from here on, as before `settle`."""
        self._is_settled = False

    def finish(self) -> None:
        """Do what `stop` does, and wait until it is known for every pair which datapath has it; a
        second at most.
        """
        self.stop()
        if self._splice is not None:
            self._splice.finish_paused()
            self.finish_ends()

    def finish_ends(self) -> None:
        """Wait for some seconds at most until the keeper knows of all that has ended."""
        if self._splice is not None:
            self._splice.finish_ends()

    def joined(self, client: Client) -> None:
        """A pair begins to flow: settle whether it will be handed over, and ask at once if due."""
        self._host.counters[_JOINED_COPY] += 1
        assert client.route is not None
        choice = client.listener.datapaths[client.route.rule.index]
        client.pair_reason = self._obstacle(client, choice)
        if client.pair_reason is _SHORT:
            self._expect(client, choice)
        if (
            client.listener.is_express
            and self._splice is not None
            and self._show_route_to_keeper(client, self._splice)
        ):
            return  # `_route_was_shown` goes on
        if client.pair_reason is _SHORT and client.is_eager:
            self._begin(client, choice)

    def joined_plainly(self, client: Client) -> None:
        """`joined` for two sockets of ours that are TCP, under `auto`: it will hardly last long.

        Not at once (`handover.at_once`), and not on a listener with `express`.
        """
        splice, sockmap = self._splice, self._sockmap
        self._host.counters[_JOINED_COPY] += 1
        if splice is None and sockmap is None:
            client.pair_reason = _NOT_AVAILABLE
            return
        client.pair_reason = _SHORT
        client.waits_for_handover = True
        if splice is not None and self._is_settled:
            client.expects_splice = client.listener.config.splice

    def _expect(self, client: Client, choice: str) -> None:
        """A pair that may be handed over: when, and what for."""
        generation = client.listener.generation
        client.waits_for_handover = True
        client.is_eager = choice in _NAMED or generation.handover.at_once
        client.expects_splice = (
            self._is_settled
            and self._splice is not None
            and choice in _BY_KEEPER
            and client.listener.config.splice
        )

    def _begin(self, client: Client, choice: str) -> None:
        """Hand over a pair that need not earn it."""
        if self._is_settled and self._splice is not None and choice in _BY_KEEPER:
            # Before the client can have read its answer: no moment is quieter.
            self._attempt(client)
        else:
            self._ask(client)

    def _show_route_to_keeper(self, client: Client, splice: SpliceDatapath) -> bool:
        """Let the keeper see how the server is reached, so that the kernel may connect there.

        Whether it does, and the pair stands still meanwhile.
        """
        assert client.route is not None
        server = client.destination
        if (
            not self._is_settled
            or not self._is_express
            or not client.listener.express_rules[client.route.rule.index]
            or not isinstance(server, Address)
        ):
            return False
        now_s = self._host.loop.now_s
        # If there is no room for it, the next connection to that server shows it: of a burst to
        # many servers that is a moment later.
        upstream = client.upstream
        has_source = upstream is not None and upstream.has_source(server)
        source = client.source_address() if has_source else None
        way = server, source.host if source is not None else ""
        if self._shown.get(way, 0.0) > now_s or not splice.can_show_route:
            return False
        if len(self._shown) >= _MOST_SHOWN:
            self._shown.clear()
        self._shown[way] = now_s + _SHOW_AGAIN_S
        if client.is_bare:
            client.settle()
        return splice.show_route(client, self._route_was_shown, has_source=has_source)

    def _route_was_shown(self, pair: Pair) -> None:
        """The keeper has looked at the pair's server: the pair goes on as any other does."""
        if TYPE_CHECKING:
            assert isinstance(pair, Client)
        if pair.life is not Life.JOINED or not pair.waits_for_handover:
            return
        if pair.is_eager or pair.handover_asked:
            self._begin(pair, self._choice(pair))

    def _obstacle(self, client: Client, choice: str) -> PairReason:
        if choice == "copy":
            return PairReason.FORCED
        if self._sockmap is None and (self._splice is None or choice not in _BY_KEEPER):
            return PairReason.NOT_AVAILABLE
        assert client.server is not None
        if client.is_unix or client.server.family == _AF_UNIX:
            return PairReason.UNIX_SOCKET
        if client.is_foreign and not (is_plain_tcp(client.client) and is_plain_tcp(client.server)):
            return PairReason.NOT_PLAIN_TCP
        return _SHORT

    def moved(self, client: Client, flow: Flow) -> None:
        """Bytes were copied: count what earns the handover."""
        if client.handover_asked:
            return
        if client.is_eager:
            self._ask(client)
            return
        if flow.direction is not client.turn_direction:
            client.turn_direction = flow.direction
            client.turns += 1
        carried_bytes = client.up.carried_bytes + client.down.carried_bytes
        when = client.listener.generation.handover
        after_bytes = when.after_bytes
        if client.expects_splice:
            after_bytes = when.splice_after_bytes
            if client.datapath_record is None and carried_bytes * _LIKELY >= after_bytes:
                assert self._splice is not None
                self._splice.expect(client)
        # A round trip: the speaker has changed twice.
        if client.turns >= 2 * when.after_round_trips or carried_bytes >= after_bytes:
            self._ask(client)

    def aged(self, client: Client) -> None:
        """The pair is looked at by the clock."""
        age_s = self._host.loop.now_s - client.accepted_s
        after_s = client.listener.generation.handover.after_s
        if age_s >= after_s and not client.handover_asked:
            self._ask(client)

    def _try_splice(self, client: Client) -> PairReason | None:
        """Ask the keeper for the pair, or queue it if the keeper has too many requests; `_answered`
        goes on. Returns what forbids it; None: nothing.
        """
        if not client.listener.config.splice:
            return PairReason.SPLICE_OFF
        splice = self._splice
        if splice is None:
            return PairReason.NOT_ELIGIBLE
        client.handover_asked = True
        if splice.is_busy:
            self._queue[client] = None  # copied meanwhile
            return None
        client.expects_splice = False  # bytes are moved for the last time in there
        config = client.listener.generation.config
        splice.takes_any_interface = config.splice_interfaces == "any"
        splice.keepalive = config.keepalive.terms
        return splice.ask(client, self._keeper_answered)

    def _keeper_answered(self, pair: Pair, reason: PairReason | None) -> None:
        """Note what has become of a pair that the keeper was asked for, and ask for the next
        ones.
        """
        if TYPE_CHECKING:
            assert isinstance(pair, Client)
        if pair.life is Life.JOINED:
            self._answered(pair, reason)
        while self._queue and self._splice is not None and not self._splice.is_busy:
            client = next(iter(self._queue))
            del self._queue[client]
            try:
                self._attempt(client)
            except Exception as error:
                self._host.loop.on_error(client, error)

    def _answered(self, client: Client, reason: PairReason | None) -> None:
        """Splice has taken the pair (None), or has not."""
        if reason is PairReason.UNREAD_BYTES:
            # The copy goes on, and its next move asks again; or the clock.
            client.handover_asked = False
            self._ask_again_soon(client)
        elif reason is PairReason.NO_KEEPER and self._wait_for_keeper(client):
            pass
        elif reason in _FINAL:
            choice = self._choice(client)
            self._end(client, reason, PairReason.BEST if choice == "auto" else PairReason.FORCED)
        else:
            client.not_spliced = reason
            self._ask(client)  # for the next best

    @staticmethod
    def _choice(client: Client) -> str:
        return client.listener.datapaths[client.route.rule.index] if client.route else "auto"

    def _ask(self, client: Client) -> None:
        # Not now: the copy datapath may be in the middle of moving bytes of this very pair.
        client.handover_asked = True
        self._host.loop.defer(self._attempt, client)

    def _wait_for_keeper(self, client: Client) -> bool:
        """Have the pair asked for again later; False: that was done often enough."""
        wait = client.keeper_wait
        if wait is None:
            wait = client.keeper_wait = KeeperWait(self.is_due, client)
        if wait.times == len(_KEEPER_PAUSES_S):
            return False
        pause_s = scaled_s(_KEEPER_PAUSES_S[wait.times])
        wait.times += 1
        client.handover_asked = True  # neither bytes nor age ask for it before
        self._host.loop.deadlines.start(wait, pause_s, self._host.loop.now_s)
        if self._splice is not None:
            self._splice.expect(client)
        client.pair_reason = PairReason.NO_KEEPER
        if client.slot >= 0:
            self._host.window.set_datapath(client.slot, client.kind, client.pair_reason)
        return True

    def is_due(self, client: Client) -> None:
        """The pair has waited long enough: it is asked for in one of the next turns."""
        if not self._due:
            self._host.loop.defer(self._ask_for_due, None)
        self._due.append(client)

    def _ask_for_due(self, _owner: None) -> None:
        for _ in range(min(len(self._due), _MOST_IN_A_TURN)):
            self._ask(self._due.popleft())
        if self._due:
            self._host.loop.defer(self._ask_for_due, None)

    def _attempt(self, client: Client) -> None:
        if client.life is not Life.JOINED or not client.waits_for_handover:
            return
        if client in self._queue or isinstance(client.datapath, PausedPair):
            return
        if client.keeper_wait is not None and client.keeper_wait.goes_on:
            return
        if client.slot < 0:
            self._host.records.show(client)
        if not self._is_settled:
            return  # `settle` asks again
        choice = self._choice(client)
        because = PairReason.BEST if choice == "auto" else PairReason.FORCED
        reason: PairReason | None = PairReason.NOT_AVAILABLE
        if client.not_spliced is not None:
            reason = because = client.not_spliced
        elif choice in _BY_KEEPER and (self._splice is not None or choice != "auto"):
            reason = self._try_splice(client)
            if reason is not None:
                self._answered(client, reason)
            return
        if self._sockmap is not None:
            self._sockmap.limit_bytes = client.listener.generation.backlog_limit_bytes
            reason = self._sockmap.join(client)
        # A pair may break, or even finish, in the first moments of its new datapath.
        if client.life is not Life.JOINED:
            return
        if reason is PairReason.UNREAD_BYTES:
            # More has arrived than was read: the copy goes on, and its next move asks again.
            client.handover_asked = False
            return
        self._end(client, reason, because)

    def _end(self, client: Client, reason: PairReason | None, because: PairReason) -> None:
        """The pair is where it stays; `reason`: why it is copied; `because`: why it is not."""
        client.waits_for_handover = False
        if reason is None:
            self._host.counters[_JOINED[client.kind]] += 1
            client.pair_reason = because
        else:
            client.pair_reason = reason
        if client.slot >= 0:
            self._host.window.set_datapath(client.slot, client.kind, client.pair_reason)
        if self._host.log.tells_steps:
            self._host.log.step(
                client, "handover", datapath=client.kind.label, why=client.pair_reason.text
            )

    def _ask_again_soon(self, client: Client) -> None:
        """Have the pair asked for again soon: nothing tells when TCP has sent the last byte, and
        then the pair may rest for hours.
        """
        if not self._again:
            self._host.loop.after(_AGAIN_S, self._ask_all_again)
        self._again.add(client)

    def _ask_all_again(self) -> None:
        clients, self._again = self._again, set()
        for client in clients:
            if client.waits_for_handover and not client.handover_asked:
                self._ask(client)
