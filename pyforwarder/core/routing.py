"""Which rule takes a connection: the listener's rules, compiled, applied to its first bytes.

Pure: no sockets and no clock; the time is passed in.  rule_compiling.py makes the rules of the
configuration.

The rules are tried in order and the first that matches decides, so a later rule may only win once
every earlier one said "no match".  While one of them needs more bytes the answer is "need more";
once no more can come (`End`), a rule that still needs them counts as "no match".  What a rule says
never depends on how the bytes were cut into segments, so neither does the decision.

Where the client names the destination, routing does not ask whether it may: the server resolves
names first and checks every address against `Route.rule.allow`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from pyforwarder.core.express.conditions import UserspaceOnly
from pyforwarder.core.first_packet.combine import All
from pyforwarder.core.first_packet.instruction import Instruction
from pyforwarder.core.first_packet.matcher import Conversation, Matcher, Speaker, Turn
from pyforwarder.core.first_packet.naming import Named
from pyforwarder.core.first_packet.outcome import (
    MATCH,
    NEED_MORE,
    NO_MATCH,
    Answer,
    Claim,
    Decision,
    End,
    Facts,
    Negotiation,
    Outcome,
    Refuse,
    Route,
    Rule,
    Send,
    Verify,
)
from pyforwarder.core.reasons import CloseReason

if TYPE_CHECKING:
    from pyforwarder.core.address import Address, NameIn
    from pyforwarder.core.express.conditions import Condition

__all__ = [
    "NEED_MORE",
    "Claim",
    "Conversation",
    "Decision",
    "End",
    "Negotiation",
    "Refuse",
    "Route",
    "Rule",
    "Ruleset",
    "Send",
    "Verify",
]


# PostgreSQL clients ask for GSS and for TLS before they say who they are, each once; what asks on
# and on would never get to the timeout's end any other way.
MAX_QUESTIONS: Final = 4


class Ruleset:
    """One listener's rules, ready to decide.  Immutable; live connections keep the one they met."""

    def __init__(self, entries: tuple[Entry, ...], *, datagrams: bool = False) -> None:
        self._entries = entries
        self.datagrams = datagrams  # first packets are datagrams, or `Datagrams` of one client
        parts = [part for entry in entries for part in entry.matcher.parts()]
        self._converses = any(
            part.asks or (isinstance(part, Speaker) and part.converses) for part in parts
        )
        # Whether another datagram may help to decide about the first.
        self.spans_datagrams = any(part.spans_datagrams for part in parts)
        self._reading = tuple(part for part in parts if part.has_facts)
        # The rules whose clients are known by connection ids when their address changes.
        self.followed = frozenset(
            entry.rule.index
            for entry in entries
            if any(part.has_connection_ids for part in entry.matcher.parts())
        )
        # Whether a first rule may say yes or no before a byte has come, and so the rules be through
        # with a connection; a server that speaks first must not wait for its client then.
        self.may_decide_at_once = any(not part.reads for part in entries[0].matcher.parts())
        # What becomes of every connection where the first rule takes them all, with any bytes.
        first = entries[0]
        self.always = first.always if isinstance(first, Fixed) else None
        # Whether it matters who the client is.
        self.asks_client = any(part.asks_client for part in parts)
        self.needs_clock = any(isinstance(part, Instruction) and part.needs_clock for part in parts)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in the order in which they are tried."""
        return tuple(entry.rule for entry in self._entries)

    def entries_from(self, first: int) -> tuple[Entry, ...]:
        """The rules from position `first` on, for `explain`."""
        return self._entries[first:]

    def conditions(self, local_port: int) -> list[Condition | str]:
        """What each rule wants, in the words of a program that sees first packets in the kernel.

        Where such a program cannot tell, the reason, for people.
        """
        return [entry.in_kernel(local_port) for entry in self._entries]

    def facts(self, rule: Rule, data: bytes) -> Facts:
        """What of these first bytes decided for a rule of these, as fields for the log."""
        return self._entries[rule.index].matcher.facts(data)

    def has_facts(self, rule: Rule) -> bool:
        """Whether `facts` may ever say something for this rule."""
        return any(part.has_facts for part in self._entries[rule.index].matcher.parts())

    def read(self, data: bytes) -> Facts:
        """The same of first bytes that were refused: what any of these rules has read of them."""
        for part in self._reading:
            facts = part.facts(data)
            if facts:
                return facts
        return ()

    def begin(self) -> Conversation | None:
        """The `state` for one connection's decisions; None: these rules never need one."""
        return Conversation() if self._converses else None

    def decide(
        self,
        data: bytes,
        client: Address | None,
        local_port: int,
        end: End = End.OPEN,
        now_unix_s: float | None = None,
        state: Conversation | None = None,
    ) -> Decision:
        """What to do with a connection whose first bytes are `data`.

        `data` is all that was received, without what an earlier Send told to drop.  `client` is
        None and `local_port` 0 on a unix socket.  `now_unix_s` is needed if `needs_clock` says
        so: without it no signed instruction is good.  `state` comes from `begin`, one for each
        connection.  NEED_MORE is only returned while `end` is OPEN; of datagrams only while another
        one may help.

        A decision that uses up a single-use token must be acted on: asking again refuses.
        """
        first = 0
        if state is not None:
            if state.turn is not None:
                return _continue(state, state.turn, data, end)
            first = state.first_rule
        undecided: Entry | None = None
        for entry in self._entries if not first else self._entries[first:]:
            answer = entry.decide(data, end, client, local_port, now_unix_s, state)
            if answer is NO_MATCH:
                continue
            if answer is not NEED_MORE:
                return answer
            if end is End.OPEN and not (
                self.datagrams and entry.is_whole(data, client, local_port)
            ):
                return NEED_MORE
            if end is End.EOF and not data:
                return _GONE
            if undecided is None or (not undecided.speaks and entry.speaks):
                undecided = entry
        if self.datagrams and end is End.OPEN:
            end = End.FULL  # no more is waited for
        return _refuse_unmatched(undecided, data, end, client, local_port)


_NO_MATCH_REFUSAL = Refuse(None, CloseReason.NO_MATCH, b"", reset=True, cause="no rule matches")
_SILENT_REFUSAL = Refuse(
    None, CloseReason.TIMEOUT, b"", reset=True, cause="first_packet.timeout is over"
)
_GONE = Refuse(None, CloseReason.CLIENT_GONE, b"", reset=False)


def _refuse_unmatched(
    undecided: Entry | None, data: bytes, end: End, client: Address | None, local_port: int
) -> Decision:
    """The decision once every rule has said no match; `undecided` is one that lacked bytes."""
    if end is End.OPEN:
        return _NO_MATCH_REFUSAL
    if not data:
        return _GONE if end is End.EOF else _SILENT_REFUSAL
    if undecided is None:
        return _NO_MATCH_REFUSAL
    reason = CloseReason.TIMEOUT if end is End.TIMEOUT else CloseReason.MALFORMED
    speaker = undecided.matcher.speaker(data, end, client, local_port)
    if not undecided.speaks or speaker is None:
        return _SILENT_REFUSAL if end is End.TIMEOUT else _NO_MATCH_REFUSAL
    reply = speaker.cut_short(end)
    return Refuse(undecided.rule, reason, reply, reset=not reply, cause=_CUT_SHORT_BY[end])


_CUT_SHORT = {
    End.FULL: CloseReason.MALFORMED,
    End.TIMEOUT: CloseReason.TIMEOUT,
    End.EOF: CloseReason.CLIENT_GONE,
}
_CUT_SHORT_BY = {
    End.FULL: "not whole within first_packet.max_bytes",
    End.TIMEOUT: "not whole within first_packet.timeout",
    End.EOF: "the client has closed in the middle of it",
}


def _continue(state: Conversation, turn: Turn, data: bytes, end: End) -> Decision:
    """The next decision of a dialogue that a rule has begun: no other rule is asked any more."""
    decision = turn.decide(data, state)
    if decision is NEED_MORE and end is not End.OPEN:
        return Refuse(
            state.rule,
            _CUT_SHORT[end],
            b"",
            reset=end is not End.EOF,
            cause=_CUT_SHORT_BY[end],
        )
    return decision


class Entry(ABC):
    """A rule and how it is applied."""

    # Whether the client names the destination in this rule.
    speaks = False

    def __init__(self, rule: Rule, matcher: Matcher) -> None:
        self.rule = rule
        self.matcher = matcher
        self._spanning = tuple(part for part in matcher.parts() if part.spans_datagrams)

    def is_whole(self, data: bytes, client: Address | None, local_port: int) -> bool:
        """Whether no other datagram can change what this rule says about these."""
        return not any(
            part.match(data, End.OPEN, client, local_port) is NEED_MORE for part in self._spanning
        )

    def in_kernel(self, local_port: int) -> Condition | str:
        """What a program in the kernel would have to find out; or why userspace alone can.

        Where it fails this rule does not match. Where it holds the rule matches, if it is one whose
        server the program can connect to (an address or an upstream); else it may.
        """
        return _in_kernel(self.matcher, local_port)

    @abstractmethod
    def decide(
        self,
        data: bytes,
        end: End,
        client: Address | None,
        local_port: int,
        now_unix_s: float | None,
        conversation: Conversation | None,
    ) -> Answer:
        """What this rule alone says."""


def _in_kernel(matcher: Matcher, local_port: int) -> Condition | str:
    try:
        return matcher.in_kernel(local_port)
    except UserspaceOnly as reason:
        return str(reason)


class Fixed(Entry):
    """A rule that says itself what happens to what it matches."""

    def __init__(self, rule: Rule, matcher: Matcher, decision: Route | Refuse) -> None:
        super().__init__(rule, matcher)
        self._decision = decision
        self._asks = any(part.asks for part in matcher.parts())
        self.always = decision if matcher.always else None

    def decide(
        self,
        data: bytes,
        end: End,
        client: Address | None,
        local_port: int,
        now_unix_s: float | None,
        conversation: Conversation | None,
    ) -> Answer:
        outcome = self.matcher.match(data, end, client, local_port)
        if outcome is MATCH:
            return self._decision
        # FULL too: what is asked about makes room, and a client that sends much at once is answered
        # as if it had come in small pieces.
        if outcome is NEED_MORE and self._asks and end in (End.OPEN, End.FULL):
            question = self.matcher.ask(data)
            if question is not None:
                assert conversation is not None, "rules that ask need Ruleset.begin()"
                if conversation.asked == MAX_QUESTIONS:
                    return NO_MATCH
                conversation.asked += 1
                conversation.first_rule = self.rule.index
                return question
        return outcome


class ToName(Entry):
    """A rule that goes where the first packet's server name or host says."""

    def __init__(self, rule: Rule, matcher: Matcher, name: NameIn, *, datagrams: bool) -> None:
        self._named = Named(name, datagrams=datagrams)
        self._without_name = matcher
        super().__init__(rule, All((matcher, self._named)))

    def in_kernel(self, local_port: int) -> Condition | str:
        # What holds without the name is for userspace all the same, which finds the name or not.
        return _in_kernel(self._without_name, local_port)

    def decide(
        self,
        data: bytes,
        end: End,
        client: Address | None,
        local_port: int,
        now_unix_s: float | None,
        conversation: Conversation | None,
    ) -> Answer:
        outcome = self.matcher.match(data, end, client, local_port)
        if outcome is not MATCH:
            return outcome
        destination = self._named.destination(data)
        assert not isinstance(destination, Outcome)  # it has just matched
        return Route(self.rule, destination, 0, None, named_by_client=True)


class Spoken(Entry):
    """A rule whose whole match is one protocol in which the client names the destination."""

    speaks = True

    def __init__(self, rule: Rule, matcher: Speaker) -> None:
        super().__init__(rule, matcher)
        self._answer = matcher.answer

    def decide(
        self,
        data: bytes,
        end: End,
        client: Address | None,
        local_port: int,
        now_unix_s: float | None,
        conversation: Conversation | None,
    ) -> Answer:
        return self._answer(self.rule, data, client, now_unix_s, conversation)


class Combined(Entry):
    """A rule with such a protocol among other conditions."""

    speaks = True

    def decide(
        self,
        data: bytes,
        end: End,
        client: Address | None,
        local_port: int,
        now_unix_s: float | None,
        conversation: Conversation | None,
    ) -> Answer:
        outcome = self.matcher.match(data, end, client, local_port)
        if outcome is not MATCH:
            return outcome
        speaker = self.matcher.speaker(data, end, client, local_port)
        assert speaker is not None  # names_destination was checked when the rule was compiled
        return speaker.answer(self.rule, data, client, now_unix_s, conversation)
