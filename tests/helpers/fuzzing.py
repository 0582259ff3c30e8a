"""What holds for any first packet and any rules; for hypothesis and for a fuzzer.

`examine` takes any bytes and makes of them rules, a first packet and how it is cut.  It fails if a
parser raises, if an answer changes with more bytes or with the cuts, or if one takes too long.
"""

from __future__ import annotations

import ast
import functools
import random
import time
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from pyforwarder.config.match import protocols
from pyforwarder.core import proxy_protocol, token
from pyforwarder.core.address import Address
from pyforwarder.core.explaining import explain
from pyforwarder.core.first_packet.cursor import ParseError
from pyforwarder.core.first_packet.options import OptionError
from pyforwarder.core.first_packet.outcome import NEED_MORE, End, Outcome, Refuse, Route, Send
from pyforwarder.core.first_packet.table import PROTOCOLS, Terms, build
from tests.helpers.dialogue import Ended, talk
from tests.helpers.rules import ruleset

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.matcher import Matcher
    from pyforwarder.core.routing import Ruleset

T = TypeVar("T")

# What first_packet.max_bytes is unless somebody says otherwise.
FULL: Final = 16 << 10
CLIENT: Final = Address("192.0.2.7", 40000)
KEYS: Final = token.TokenKeys({"ops": b"k" * 32}, clock_skew_s=5.0, max_lifetime_s=3600.0)
PASSWORDS: Final = {"alice": b"s3cret"}
NOW_UNIX_S: Final = 1_800_000_000.0

# Conditions that read something, so that a parser goes on after the first bytes.
LEAVES: Final[tuple[object, ...]] = (
    *sorted({word for word, each in PROTOCOLS.items() if each.in_streams} - {"bytes", "regex"}),
    {"tls": {"sni": "*.example.com"}},
    {"tls": {"alpn": "h2", "version": ["1.2", "1.3"]}},
    {"http": {"host": ["*.example.com", "a"]}},
    {"http": {"path": "/v1/*", "method": ["GET", "POST"]}},
    {"http": {"header": {"upgrade": "*socket*", "x": "a*b*c"}}},
    {"socks": {"version": "4"}},
    {"socks": {"version": "5"}},
    {"rdp": {"cookie": "a*"}},
    {"postgres": {"user": "app"}},
    {"postgres": {"database": "app*", "user": "*"}},
    {"mqtt": {"client_id": "sensor*"}},
    {"dns": {"qname": "*.example"}},
    {"dns": {"qtype": ["AAAA", "TYPE65280"]}},
    {"xmpp": {"to": "*.example.com"}},
    {"bytes": {"prefix": ["GET ", "hex:1603"], "offset": 2}},
    {"bytes": "hex:00"},
    {"regex": "^[A-Z]+ /"},
    {"regex": ["^(a|ab)*c", "^\\x16\\x03[\\x00-\\x04]"]},
    {"regex": "end.{0,9}of"},
    {"client": "192.0.2.0/24"},
    {"client": "198.51.100.0/24"},
    {"port": [9999, "1-99"]},
)


class SlowError(AssertionError):
    """An answer took longer than it may."""


class Stopwatch:
    """Measures the processor time of single calls, and refuses too much of it.

    Of the processor, so that other work on the machine counts as little as it can.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self.calls = 0
        self.worst: dict[str, tuple[float, int]] = {}  # by what was asked: seconds, bytes

    def time(self, name: str, data: bytes, call: Callable[[], T]) -> T:
        """What `call` returns, which looks at `data`.

        Raises:
            SlowError: it took too long.
        """
        before_s = time.thread_time()
        result = call()
        took_s = time.thread_time() - before_s
        self.calls += 1
        self.worst[name] = max(self.worst.get(name, (0.0, 0)), (took_s, len(data)))
        if took_s > self._most_s:
            raise SlowError(f"{name}: {took_s * 1e3:.1f} ms for {len(data)} bytes")
        return result


class Reader:
    """Takes a fuzzer's bytes apart; where they end it reads zeroes."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self, below: int) -> int:
        """A number from 0 up to `below`."""
        byte = self._data[self._at] if self._at < len(self._data) else 0
        self._at += 1
        return byte % below

    def rest(self) -> bytes:
        """What has not been read."""
        return self._data[self._at :]


def match_from(reader: Reader, depth: int = 0) -> object:
    """What may stand after `match:`, as the bytes say."""
    kind = reader.number(8 if depth < 3 else 1)
    if kind < 4:
        return LEAVES[reader.number(len(LEAVES))]
    if kind == 4:
        return {"not": match_from(reader, depth + 1)}
    parts = [match_from(reader, depth + 1) for _ in range(1 + reader.number(3))]
    return parts if kind == 5 else {("all" if kind == 6 else "any_of"): parts}


def rules_from(reader: Reader) -> Ruleset:
    """Up to four rules, as the bytes say."""
    count = 1 + reader.number(4)
    return _compile(repr([(match_from(reader), reader.number(2)) for _ in range(count)]))


# Compiling costs a hundred decisions.
@functools.lru_cache(maxsize=1000)
def _compile(program: str) -> Ruleset:
    rules: list[dict[str, object]] = []
    for match, strict in ast.literal_eval(program):
        rule: dict[str, object] = {"match": match}
        if not build(match, Terms()).names_destination:
            rule["to"] = "127.0.0.1:1"
        else:
            rule["allow"] = ["any"]
            words = set(protocols(match))
            if "instruction" in words and strict:
                rule |= {"checksum": "required", "token": "optional"}
            if words & {"socks", "http_connect"} and strict:
                rule["users"] = ["alice"]
        rules.append(rule)
    return ruleset(*rules, keys=KEYS, passwords=PASSWORDS)


def pieces_of(data: bytes) -> list[bytes]:
    """The bytes cut in a way of their own."""
    chance = random.Random(zlib.crc32(data))
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(6)))
    return [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def examine_matcher(name: str, matcher: Matcher, data: bytes, watch: Stopwatch) -> None:
    """One condition: three outcomes, the first that is final stays, and none takes long."""
    lengths = range(len(data) + 1)
    if len(data) > 100:
        lengths = range(0, len(data) + 1, len(data) // 50)
    settled: Outcome | None = None
    for length in (*lengths, len(data)):
        part = data[:length]
        said = watch.time(name, part, lambda part=part: matcher.match(part, End.OPEN, CLIENT, 9999))  # type: ignore[misc]
        assert isinstance(said, Outcome)
        assert settled is None or said is settled, (name, length, said, settled)
        if said is not NEED_MORE:
            settled = said
    for end in End:
        outcome = matcher.match(data, end, CLIENT, 9999)
        assert settled is None or outcome is settled
    assert isinstance(watch.time(f"{name}.describe", data, lambda: matcher.describe(data)), str)


MATCHERS: Final = tuple((repr(leaf), build(leaf, Terms())) for leaf in LEAVES)


def examine_rules(rules: Ruleset, data: bytes, watch: Stopwatch) -> None:
    """Rules: the cuts say nothing, an end decides, and `explain` tells the same."""

    def decide(part: bytes, end: End) -> object:
        return rules.decide(
            part,
            client=CLIENT,
            local_port=9999,
            end=end,
            now_unix_s=NOW_UNIX_S,
            state=rules.begin(),
        )

    first = watch.time("decide", data, lambda: decide(data, End.OPEN))

    def hear(pieces: list[bytes]) -> Ended:
        return talk(rules, pieces, client=CLIENT, local_port=9999, now_unix_s=NOW_UNIX_S)

    whole = watch.time("dialogue", data, lambda: hear([data]))
    assert whole.decision is NEED_MORE or isinstance(whole.decision, Route | Refuse)
    # The empty piece first: some rules decide before a byte has come.
    every_byte = [b"", *(data[at : at + 1] for at in range(len(data)))]
    for pieces in (pieces_of(data), every_byte if len(data) <= 200 else [b"", data]):
        cut = hear(pieces)
        assert (cut.decision, cut.said) == (whole.decision, whole.said), pieces
    for end in End:
        last = watch.time("decide", data, lambda end=end: decide(data, end))  # type: ignore[misc]
        assert (last is NEED_MORE) <= (end is End.OPEN)
        # Of nothing sent an end makes a client that was silent, or has gone.
        if data and not isinstance(first, Send) and first is not NEED_MORE:
            assert last == first
    told = explain(rules, data, client=CLIENT, local_port=9999, now_unix_s=NOW_UNIX_S)
    assert b"".join(told.said) == whole.said or first is NEED_MORE
    if not isinstance(first, Send):
        assert told.decision == first
    assert 0 <= told.after_bytes <= len(data)


def examine_header(data: bytes, watch: Stopwatch) -> None:
    """A PROXY header and a signed instruction: read, refused or awaited, once and for all."""
    for name, read in (("proxy_protocol", proxy_protocol.read), ("token", token.read)):
        settled: object = None
        step = max(1, len(data) // 50)
        for length in (*range(0, len(data) + 1, step), len(data)):
            part = data[:length]
            try:
                said: object = watch.time(name, part, lambda read=read, part=part: read(part))  # type: ignore[misc]
            except ParseError:
                said = "refused"
            assert settled is None or said == settled
            if said is not NEED_MORE:
                settled = said


def examine_pattern(data: bytes, watch: Stopwatch) -> None:
    """A regular expression of somebody's: a config error, or a condition like any other."""
    pattern, _, text = data.partition(b"\0")
    try:
        matcher = watch.time(
            "regex.compile",
            pattern,
            lambda: build({"regex": pattern.decode("latin-1")}, Terms()),
        )
    except OptionError:
        return
    examine_matcher("regex", matcher, text, watch)


def examine(data: bytes, watch: Stopwatch) -> None:
    """Everything, as the first byte says."""
    reader = Reader(data)
    kind = reader.number(8)
    if kind == 0:
        examine_header(reader.rest(), watch)
    elif kind == 1:
        examine_pattern(reader.rest(), watch)
    elif kind < 4:
        # Long ones too: what a client sends again and again until the first packet is full.
        name, matcher = MATCHERS[reader.number(len(MATCHERS))]
        text = reader.rest()
        if kind == 3 and text:
            text = (text * (FULL // len(text) + 1))[:FULL]
        examine_matcher(name, matcher, text, watch)
    else:
        examine_rules(rules_from(reader), reader.rest(), watch)
