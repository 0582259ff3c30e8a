"""Spliced pairs that outlived their worker, or the whole daemon: they go on, and are ours now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyforwarder.core.connection import Event, Life, next_life
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import Route
from pyforwarder.datapath.base import OPENED_BY_KERNEL, PairReason
from pyforwarder.datapath.ebpf.abi import DatapathKind, PairState
from pyforwarder.datapath.express.connect_abi import ID_BIT
from pyforwarder.worker.client import Client, address_of
from pyforwarder.worker.express import count_opened, leads_to, server_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pyforwarder.core.first_packet.outcome import Facts
    from pyforwarder.datapath.splice.adopted import Orphan
    from pyforwarder.datapath.splice.datapath import SpliceDatapath
    from pyforwarder.worker.server import Server

# When the keeper is asked again for those that could not be had yet.
_AGAIN_S: Final = 1.0


def adopt_orphans(
    server: Server,
    splice: SpliceDatapath,
    done: Callable[[int], None],
    facts_of: Callable[[int], Facts] = lambda _id: (),
    *,
    level: str = "info",
) -> None:
    """Take in what waits for this worker, as the keeper gives it; `done` gets how many pairs.

    `facts_of` says what was read of the first packet of a pair, by its id. `level` is that of the
    line about those that come later.

    Best before the worker connects anywhere: from then on their ports are taken. Those whose old
    sockets are still there (a worker of the daemon before has not come to them yet) are taken in
    later on, if it has closed them by then.
    """
    number = 0

    def take(orphan: Orphan) -> None:
        nonlocal number
        number += 1
        client = _client_of(server, orphan)
        client.facts = facts_of(orphan.id)
        server.take_in(client)
        client.life, _ = next_life(client.life, Event.ADOPTED)
        record = orphan.record
        if record is not None and record.datapath == DatapathKind.NONE:
            # The kernel has opened it by itself: nobody has counted it before.
            assert client.route is not None
            server.next_id()
            count_opened(server, client.listener, client.route.rule)
        resume_spliced(server, splice, client, orphan)

    def report(adopted: int) -> None:
        if adopted:
            server.log.log.write(level, "adopted", pairs=adopted)

    def ask_again() -> None:
        splice.adopts_later = False
        adopt_orphans(server, splice, report, facts_of, level=level)

    def later() -> None:
        if not splice.adopts_later:
            splice.adopts_later = True
            server.loop.after(_AGAIN_S, ask_again)

    splice.adopt(take, lambda: done(number), later)


def resume_spliced(
    server: Server,
    splice: SpliceDatapath,
    client: Client,
    orphan: Orphan,
    *,
    left_bytes: Sequence[int] = (0, 0),
    is_mute: bool = True,
) -> None:
    """The client, which the server has taken in, is the orphan from here on, watched and shown.

    It is reset for the reason `internal` where the pair table has no room for it, or the keeper
    refuses it later on: nothing could end it or count it. `left_bytes` and `is_mute`: see
    SpliceDatapath.resume.
    """
    for fd in (client.client_fd, client.server_fd):
        server.loop.watch(fd, 0, splice.ready, client)
    client.datapath = splice
    client.kind = DatapathKind.SPLICE
    client.pair_reason = PairReason.GOES_ON
    record = orphan.record
    if record is not None and record.datapath == DatapathKind.NONE:
        client.pair_reason = PairReason.DECIDED
    elif orphan.id >> ID_BIT or (record is not None and record.reason in OPENED_BY_KERNEL):
        client.pair_reason = PairReason.DECIDED_BEFORE
    _show_as_before(server, client, orphan)
    if client.slot < 0:
        splice.forget(orphan.index, orphan.id)
        client.datapath = None
        server.broken(client, CloseReason.INTERNAL)
        return
    splice.resume(client, orphan, left_bytes=left_bytes, is_mute=is_mute)
    if client.life is Life.JOINED:
        for flow in (client.up, client.down):
            server.moved(client, flow)
        server.watch_idle(client)


def _client_of(server: Server, orphan: Orphan) -> Client:
    """Make the orphan's client as if it had come by its listener and its rule, as far as these
    still exist.
    """
    record = orphan.record
    listener, rule = server.generation.listener_and_rule(
        record.listener_name.decode(errors="replace") if record else "",
        orphan.client.getsockname()[1],
        record.rule.decode(errors="replace") if record else "",
    )
    peer = address_of(orphan.client.getpeername())
    client = Client(
        server, listener, orphan.client, orphan.client.fileno(), peer, server.loop.now_s
    )
    client.id = orphan.id
    client.attach_server(orphan.server, orphan.server.fileno())
    client.destination = address_of(orphan.server.getpeername())
    assert client.destination is not None
    client.route = Route(rule, client.destination, 0, None, False)
    if record is not None and record.datapath == DatapathKind.NONE:
        client.route = Route(rule, leads_to(rule, client.destination), 0, None, False)
        if (held := server_of(server, rule, client.destination)) is not None:
            server.servers.hold(client, str(rule.to), held[1].name)
    if record is not None:
        client.accepted_s = record.started_ns / 1e9
        for flow in (client.up, client.down):
            flow.carried_bytes = record.worker[flow.direction].carried_bytes
            flow.carried_packets = record.worker[flow.direction].carried_packets
    return client


def _show_as_before(server: Server, client: Client, orphan: Orphan) -> None:
    """Write the record as it was, with the names that the configuration may not know any more."""
    server.records.show(client)
    record = orphan.record
    if record is None or client.slot < 0:
        return
    ends = (record.client, record.listener, record.source, record.server)
    server.window.describe(
        client.slot,
        pair_id=client.id,
        started_ns=record.started_ns,
        endpoints=b"".join(map(bytes, ends)),
        rule=record.rule,
        listener=record.listener_name,
        state=PairState.JOINED,
        datapath=client.kind,
        reason=client.pair_reason,
    )
