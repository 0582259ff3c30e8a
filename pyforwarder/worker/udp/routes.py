"""Where a session leads that was opened elsewhere: by another worker, or by a connection id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.core.address import Address, HostPort, NameIn, SamePort
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import Route
from pyforwarder.datapath.ebpf.abi import NAME_BYTES

if TYPE_CHECKING:
    from pyforwarder.core.address import ServerAddress
    from pyforwarder.core.upstreams import ServerState
    from pyforwarder.datapath.splice.sessions import SessionOrphan
    from pyforwarder.worker.generation import ListenerState, UpstreamState
    from pyforwarder.worker.udp.connection_ids import SessionTarget


def route_of(
    listener: ListenerState, orphan: SessionOrphan, now_s: float
) -> Route | tuple[CloseReason, str]:
    """Return the route that the session would get by its rule now; or why no rule leads there any
    more.

    The worker that opened it may have been taken over, and the configuration may be another.
    """
    # `show` has as much of the name as there is room for.
    name = orphan.record.rule if orphan.record is not None else b""
    names = [each[: NAME_BYTES - 1] for each in listener.rule_names]
    if name not in names:
        return CloseReason.NO_MATCH, "its rule is not there any more"
    rule = listener.ruleset.rules[names.index(name)]
    if rule.reject is not None:
        return CloseReason.REJECTED, "its rule rejects"
    server = Address(*orphan.server.getpeername()[:2])
    to, generation = rule.to, listener.generation
    if isinstance(to, str):
        if server_of(generation.upstreams[to], server, listener.local_port) is None:
            return CloseReason.UNREACHABLE, f"{server} is not in its upstream any more"
        by_client = False
    elif to is None or isinstance(to, NameIn):
        by_client = True  # under `allow`
    elif _may_be(to, server, listener.local_port):
        by_client = False
    else:
        return CloseReason.UNREACHABLE, f"its rule does not lead to {server} any more"
    if not generation.permits(rule, server, now_s, protocol="udp"):
        cause = rule.allow.refusal(server.host, server.port) if rule.allow is not None else None
        return CloseReason.DENIED, cause or f"{server} is this forwarder"
    return Route(rule, server, 0, None, by_client)


def followed_route(listener: ListenerState, target: SessionTarget) -> Route | None:
    """Where a connection id leads under this configuration; None: no rule has it go there.

    Another worker may have written what `target` says.
    """
    if target.rule not in listener.rule_counters:
        return None
    rule = listener.ruleset.rules[listener.rule_counters.index(target.rule)]
    to = rule.to
    if rule.index not in listener.ruleset.followed or rule.reject is not None:
        return None
    if to is None or isinstance(to, NameIn):
        # Under `allow`, as every destination that a client has named.
        return Route(rule, target.server, 0, None, named_by_client=True)
    wanted: ServerAddress = to if not isinstance(to, str) else target.server
    if isinstance(to, str):
        servers = listener.generation.upstreams[to].balancer.servers
        if not 0 <= target.number < len(servers):
            return None
        wanted = servers[target.number].address
    if isinstance(wanted, SamePort):
        wanted = wanted.at(listener.local_port)
    if isinstance(wanted, Address) and wanted != target.server:
        return None
    return Route(rule, to, 0, None, named_by_client=False)


def server_of(upstream: UpstreamState, server: Address, local_port: int) -> ServerState | None:
    """Which server of the upstream that is; None: it has no such one."""
    fit = [s for s in upstream.balancer.servers if _may_be(s.address, server, local_port)]
    # Rather than one whose name may stand for it.
    return next((s for s in fit if s.address == server), fit[0] if fit else None)


def _may_be(to: ServerAddress, server: Address, local_port: int) -> bool:
    """Whether a rule or an upstream that leads to `to` can have led there."""
    if isinstance(to, SamePort):
        to = to.at(local_port)
    if isinstance(to, HostPort):
        return to.port == server.port  # its name has stood for that address
    return to == server
