"""Which rule takes a connection: the listener's rules, compiled, applied to its first bytes.

Pure: no sockets and no clock; the time is passed in.

The rules are tried in order and the first that matches decides, so a later rule may only win once
every earlier one said "no match".  While one of them needs more bytes the answer is "need more";
once no more can come (`End`), a rule that still needs them counts as "no match".  What a rule says
never depends on how the bytes were cut into segments, so neither does the decision.

Where the client names the destination, routing does not ask whether it may: the server resolves
names first and checks every address against `Route.rule.allow`.
"""

from __future__ import annotations

import bisect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from pyforwarder.errors import ConfigError
from pyforwarder.first_packet.credentials import Users
from pyforwarder.first_packet.instruction import Instruction, TokenUse
from pyforwarder.first_packet.matcher import Conversation, Matcher, Speaker, Turn
from pyforwarder.first_packet.options import OptionError
from pyforwarder.first_packet.outcome import (
    MATCH,
    NEED_MORE,
    NO_MATCH,
    Answer,
    Decision,
    End,
    Negotiation,
    Outcome,
    Refuse,
    Route,
    Rule,
    Send,
)
from pyforwarder.first_packet.table import Terms, build
from pyforwarder.reasons import CloseReason

if TYPE_CHECKING:
    from pyforwarder.address import Address, HostPort, UnixAddress
    from pyforwarder.policy import AllowList
    from pyforwarder.token import TokenKeys

__all__ = [
    "NEED_MORE",
    "Conversation",
    "Decision",
    "End",
    "Explanation",
    "Negotiation",
    "Refuse",
    "Route",
    "Rule",
    "RuleReport",
    "Ruleset",
    "Send",
    "compile_rules",
    "explain",
]


# PostgreSQL clients ask for GSS and for TLS before they say who they are, each once; what asks on
# and on would never get to the timeout's end any other way.
MAX_QUESTIONS: Final = 4


class RuleConfig(Protocol):
    """What is read of a rule's configuration."""

    @property
    def name(self) -> str | None: ...
    @property
    def match(self) -> object: ...
    @property
    def allow(self) -> AllowList | None: ...
    @property
    def ack(self) -> bool: ...
    @property
    def checksum(self) -> str: ...
    @property
    def token(self) -> str: ...
    @property
    def users(self) -> Sequence[str]: ...
    @property
    def to(self) -> Address | HostPort | UnixAddress | str | None: ...
    @property
    def reject(self) -> str | None: ...
    @property
    def datapath(self) -> str | None: ...


class ListenerConfig(Protocol):
    """What is read of a listener's configuration."""

    @property
    def rules(self) -> Sequence[RuleConfig]: ...


class Ruleset:
    """One listener's rules, ready to decide.  Immutable; live connections keep the one they met."""

    def __init__(self, entries: tuple[_Entry, ...]) -> None:
        self._entries = entries
        parts = [part for entry in entries for part in entry.matcher.parts()]
        self._converses = any(
            part.asks or (isinstance(part, Speaker) and part.converses) for part in parts
        )
        # Whether a first rule may say yes or no before a byte has come, and so the rules be through
        # with a connection; a server that speaks first must not wait for its client then.
        self.may_decide_at_once = any(not part.reads for part in entries[0].matcher.parts())
        self.needs_clock = any(isinstance(part, Instruction) and part.needs_clock for part in parts)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules in the order in which they are tried."""
        return tuple(entry.rule for entry in self._entries)

    def entries_from(self, first: int) -> tuple[_Entry, ...]:
        """The rules from position `first` on, for `explain`."""
        return self._entries[first:]

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
        connection.  NEED_MORE is only returned while `end` is OPEN.

        A decision that uses up a single-use token must be acted on: asking again refuses.
        """
        first = 0
        if state is not None:
            if state.turn is not None:
                return _continue(state, state.turn, data, end)
            first = state.first_rule
        undecided: _Entry | None = None
        for entry in self._entries if not first else self._entries[first:]:
            answer = entry.decide(data, end, client, local_port, now_unix_s, state)
            if answer is NO_MATCH:
                continue
            if answer is not NEED_MORE:
                return answer
            if end is End.OPEN:
                return NEED_MORE
            if end is End.EOF and not data:
                return _GONE
            if undecided is None or (not undecided.speaks and entry.speaks):
                undecided = entry
        return _refuse_unmatched(undecided, data, end, client, local_port)


_NO_MATCH_REFUSAL = Refuse(None, CloseReason.NO_MATCH, b"", reset=True)
_SILENT_REFUSAL = Refuse(None, CloseReason.TIMEOUT, b"", reset=True)
_GONE = Refuse(None, CloseReason.CLIENT_GONE, b"", reset=False)


def _refuse_unmatched(
    undecided: _Entry | None, data: bytes, end: End, client: Address | None, local_port: int
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
    return Refuse(undecided.rule, reason, reply, reset=not reply)


_CUT_SHORT = {
    End.FULL: CloseReason.MALFORMED,
    End.TIMEOUT: CloseReason.TIMEOUT,
    End.EOF: CloseReason.CLIENT_GONE,
}


def _continue(state: Conversation, turn: Turn, data: bytes, end: End) -> Decision:
    """The next decision of a dialogue that a rule has begun: no other rule is asked any more."""
    decision = turn.hear(data, state)
    if decision is NEED_MORE and end is not End.OPEN:
        return Refuse(state.rule, _CUT_SHORT[end], b"", reset=end is not End.EOF)
    return decision


class _Entry(ABC):
    """A rule and how it is applied."""

    # Whether the client names the destination in this rule.
    speaks = False

    def __init__(self, rule: Rule, matcher: Matcher) -> None:
        self.rule = rule
        self.matcher = matcher

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


class _Fixed(_Entry):
    """A rule that says itself what happens to what it matches."""

    def __init__(self, rule: Rule, matcher: Matcher, decision: Route | Refuse) -> None:
        super().__init__(rule, matcher)
        self._decision = decision
        self._asks = any(part.asks for part in matcher.parts())

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


class _Spoken(_Entry):
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


class _Combined(_Entry):
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


def compile_rules(
    listener: ListenerConfig,
    keys: TokenKeys | None = None,
    *,
    passwords: Mapping[str, bytes] | None = None,
    path: str = "listener",
) -> Ruleset:
    """The rules of `listener`, ready to decide.

    `keys` are the keys of signed instructions, `passwords` those of the users that rules name;
    `path` is where the listener stands in the configuration, for errors.

    Raises:
        ConfigError: a rule's match cannot be used, or the rule does not say what to do.
    """
    return Ruleset(
        tuple(
            _compile_rule(config, index, keys, passwords or {}, f"{path}.rules[{index}]")
            for index, config in enumerate(listener.rules)
        )
    )


def _compile_rule(
    config: RuleConfig,
    index: int,
    keys: TokenKeys | None,
    passwords: Mapping[str, bytes],
    path: str,
) -> _Entry:
    rule = Rule(
        name=config.name or f"rule-{index + 1}",
        index=index,
        allow=config.allow,
        ack=config.ack,
        to=config.to,
        reject=config.reject,
        datapath=config.datapath,
    )
    terms = Terms(
        acknowledged=config.ack,
        checksum_required=config.checksum == "required",
        tokens=TokenUse(config.token),
        keys=keys,
        users=_users(config.users, passwords, path),
    )
    try:
        matcher = build(config.match, terms)
    except OptionError as error:
        below = error.key if not error.key or error.key.startswith("[") else f".{error.key}"
        raise ConfigError(error.reason, path=f"{path}.match{below}") from None
    if rule.to is not None and rule.reject is not None:
        raise ConfigError("says both `to` and `reject`", path=path)
    if rule.to is not None:
        return _Fixed(rule, matcher, Route(rule, rule.to, 0, None, named_by_client=False))
    if rule.reject is not None:
        refusal = Refuse(rule, CloseReason.REJECTED, b"", reset=rule.reject == "reset")
        return _Fixed(rule, matcher, refusal)
    if not matcher.names_destination:
        raise ConfigError("says neither `to` nor `reject`, and the client cannot say it", path=path)
    if rule.allow is None:
        raise ConfigError("lets the client name the destination and must say `allow`", path=path)
    return _Spoken(rule, matcher) if isinstance(matcher, Speaker) else _Combined(rule, matcher)


def _users(names: Sequence[str], passwords: Mapping[str, bytes], path: str) -> Users | None:
    for name in names:
        if name not in passwords:
            raise ConfigError(f"no password of a user {name!r} was read", path=f"{path}.users")
    return Users({name: passwords[name] for name in names}) if names else None


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

    In a dialogue `data` is everything the client sends, our answers left out.  It decides over
    and over: compile `ruleset` with keys that remember no used tokens.
    """
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
        if not isinstance(decision, Send):
            break
        said.append(decision.data)
        dropped += decision.skip
    return Explanation(
        decision, dropped + needed, tuple(said), tuple(reports[index] for index in sorted(reports))
    )


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
    entry: _Entry, data: bytes, dropped: int, end: End, client: Address | None, local_port: int
) -> RuleReport:
    def outcome_after(length: int) -> Outcome:
        return entry.matcher.match(data[:length], End.OPEN, client, local_port)

    needed = _fewest(len(data), lambda length: outcome_after(length) is not NEED_MORE)
    outcome = outcome_after(needed)
    if outcome is NEED_MORE:
        outcome = entry.matcher.match(data, end, client, local_port)
    found = entry.matcher.found(data[:needed])
    if outcome is NEED_MORE:
        why = f"cannot tell from {len(data)} bytes"
    elif outcome is MATCH or found:
        why = found
    elif needed:
        why = f"ruled out by byte {dropped + needed} (0x{data[needed - 1]:02x})"
    else:
        why = "ruled out by where the connection comes from or goes to"
    return RuleReport(entry.rule, outcome, dropped + needed, why)
