"""A packet filter that follows connections, as ufw and firewalld set one up on a host.

What goes over `lo` passes: docs/datapaths.md tells why it must.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tests.helpers.netns import Network

# The ports are those of tests/helpers/spliced.py.
_RULES: Final = """
table inet stateful {
    counter invalid {}
    chain in {
        type filter hook input priority 0; policy drop;
        iif lo accept
        ct state invalid counter name invalid drop
        ct state established,related accept
        tcp dport {7004, 7006} accept
        meta l4proto ipv6-icmp accept
    }
    chain out {
        type filter hook output priority 0; policy accept;
        oif lo accept
        ct state invalid counter name invalid drop
    }
}
"""


@contextlib.contextmanager
def stateful_filter(forwarder: Network) -> Iterator[None]:
    """On this host, until the end of the block: it drops what conntrack takes for invalid."""
    forwarder.run("nft", "-f", "-", stdin=_RULES)
    try:
        yield
    finally:
        forwarder.run("nft", "delete", "table", "inet", "stateful")


def invalid_packets(forwarder: Network) -> int:
    """How many packets that filter has taken for invalid."""
    said = forwarder.run("nft", "-j", "list", "counter", "inet", "stateful", "invalid")
    (counter,) = (one["counter"] for one in json.loads(said)["nftables"] if "counter" in one)
    return int(counter["packets"])
