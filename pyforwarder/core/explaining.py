"""Why a listener's rules decide what they decide about a first packet (`pyforwarder explain`).

Pure, as routing.py is, and asks nothing but that.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pyforwarder.core.first_packet.datagrams import Datagrams, datagrams_in
from pyforwarder.core.first_packet.matcher import Conversation
from pyforwarder.core.first_packet.outcome import (
    MATCH,
    NEED_MORE,
    Decision,
    End,
    Outcome,
    Rule,
    Send,
    Verify,
)
from pyforwarder.core.password import verify
from pyforwarder.core.wording import counted

if TYPE_CHECKING:
    from pyforwarder.core.address import Address
    from pyforwarder.core.routing import Entry, Ruleset


class RuleReport(NamedTuple):
    """What one rule alone says about a first packet."""

    rule: Rule
    outcome: Outcome
    after_bytes: int  # how many were needed to know; all of them while the outcome is NEED_MORE
    why: str


class Explanation(NamedTuple):
    """What happens to a connection that begins with these bytes."""

    decision: Decision
    after_bytes: int  # how many were needed to decide
    said: tuple[bytes, ...]  # what we sent in between, in dialogues
    rules: tuple[RuleReport, ...]
    after_datagrams: int = 0  # how many were needed; 0: the listener takes streams


def explain(
    ruleset: Ruleset,
    data: bytes,
    *,
    client: Address | None = None,
    local_port: int = 0,
    end: End = End.OPEN,
    now_unix_s: float | None = None,
) -> Explanation:
    """Why `ruleset` decides what it decides about a connection whose client sends `data`.

    In a dialogue `data` is everything the client sends, our answers left out; of a client that
    sends datagrams it is the first, or `Datagrams`.  It decides over and over: compile `ruleset`
    with keys that remember no used tokens.
    """
    if ruleset.datagrams:
        return _explain_datagrams(ruleset, datagrams_in(data), client, local_port, end, now_unix_s)
    conversation = ruleset.begin()
    reports: dict[int, RuleReport] = {}
    said: list[bytes] = []
    dropped = 0
    while True:
        rest = data[dropped:]

        def decide(length: int, state: Conversation | None) -> Decision:
            return ruleset.decide(
                rest[:length],  # noqa: B023 - called before `rest` changes
                client=client,
                local_port=local_port,
                end=end if length == len(rest) else End.OPEN,  # noqa: B023
                now_unix_s=now_unix_s,
                state=state,
            )

        if conversation is None or conversation.turn is None:
            for entry in ruleset.entries_from(conversation.first_rule if conversation else 0):
                reports[entry.rule.index] = _report(entry, rest, dropped, end, client, local_port)
        needed = _fewest(
            len(rest), lambda length: decide(length, _copy(conversation)) is not NEED_MORE
        )
        decision = decide(needed, conversation)
        if isinstance(decision, Verify):
            # `explain` waits for this, and serves nobody meanwhile.
            decision = decision.then(verify(decision.stored, decision.password))
        if not isinstance(decision, Send):
            break
        said.append(decision.data)
        dropped += decision.skip
    return Explanation(
        decision, dropped + needed, tuple(said), tuple(reports[index] for index in sorted(reports))
    )


def _explain_datagrams(
    ruleset: Ruleset,
    datagrams: tuple[bytes, ...],
    client: Address | None,
    local_port: int,
    end: End,
    now_unix_s: float | None,
) -> Explanation:
    def decide(count: int) -> Decision:
        return ruleset.decide(
            Datagrams(datagrams[:count]),
            client=client,
            local_port=local_port,
            end=end if count == len(datagrams) else End.OPEN,
            now_unix_s=now_unix_s,
            state=ruleset.begin(),
        )

    sizes = [0, *itertools.accumulate(map(len, datagrams))]
    counts = range(1, len(datagrams) + 1)
    needed = next((n for n in counts if decide(n) is not NEED_MORE), len(datagrams))

    def report(entry: Entry) -> RuleReport:
        def outcome_after(count: int) -> Outcome:
            return entry.matcher.match(Datagrams(datagrams[:count]), End.OPEN, client, local_port)

        after = next((n for n in counts if outcome_after(n) is not NEED_MORE), len(datagrams))
        seen = Datagrams(datagrams[:after])
        outcome, found = outcome_after(after), entry.matcher.describe(seen)
        if outcome is NEED_MORE:
            more = "datagram" if after == 1 else "datagrams"
            why = f"cannot tell from {after} {more}" + (f": {found}" if found else "")
        elif outcome is MATCH or found:
            why = found
        else:
            why = "not what the datagram is, or where it comes from or goes to"
        return RuleReport(entry.rule, outcome, sizes[after], why)

    reports = tuple(report(entry) for entry in ruleset.entries_from(0))
    return Explanation(decide(needed), sizes[needed], (), reports, needed)


def _copy(conversation: Conversation | None) -> Conversation | None:
    """A conversation in the same place, so that trying a decision does not move the real one."""
    if conversation is None:
        return None
    copy = Conversation()
    copy.asked = conversation.asked
    copy.first_rule = conversation.first_rule
    copy.rule = conversation.rule
    copy.turn = conversation.turn
    return copy


def _fewest(most: int, holds: Callable[[int], bool]) -> int:
    """The smallest number up to `most` for which `holds`; `most` if none.

    Looks at a few lengths only: what was decided stays decided when bytes are added.
    """
    return bisect.bisect_left(range(most), True, key=holds)


def _report(
    entry: Entry, data: bytes, dropped: int, end: End, client: Address | None, local_port: int
) -> RuleReport:
    def outcome_after(length: int) -> Outcome:
        return entry.matcher.match(data[:length], End.OPEN, client, local_port)

    needed = _fewest(len(data), lambda length: outcome_after(length) is not NEED_MORE)
    outcome = outcome_after(needed)
    if outcome is NEED_MORE:
        outcome = entry.matcher.match(data, end, client, local_port)
    found = entry.matcher.describe(data[:needed])
    if outcome is NEED_MORE:
        why = f"cannot tell from {counted(len(data), 'byte')}"
    elif outcome is MATCH or found:
        why = found
    elif needed:
        why = f"ruled out by byte {dropped + needed} (0x{data[needed - 1]:02x})"
    else:
        why = "ruled out by where the connection comes from or goes to"
    return RuleReport(entry.rule, outcome, dropped + needed, why)
