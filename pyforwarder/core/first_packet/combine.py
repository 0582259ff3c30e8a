"""Conditions made of conditions: `all`, `any_of`, `not`.

With NEED_MORE between NO_MATCH and MATCH these are the three-valued and, or, not: an answer is
final as soon as no open part can change it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.core.express.conditions import Every, Negated, Some
from pyforwarder.core.first_packet.matcher import Matcher, Speaker
from pyforwarder.core.first_packet.outcome import MATCH, NEED_MORE, NO_MATCH, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyforwarder.core.address import Address
    from pyforwarder.core.express.conditions import Condition
    from pyforwarder.core.first_packet.matcher import ListenerFacts
    from pyforwarder.core.first_packet.outcome import End, Facts, Send


class _Several(Matcher):
    """Parts whose questions, names and facts are those of the whole."""

    def __init__(self, parts: tuple[Matcher, ...]) -> None:
        self._parts = parts

    def ask(self, data: bytes) -> Send | None:
        questions = (part.ask(data) for part in self._parts)
        return next((question for question in questions if question is not None), None)

    def describe(self, data: bytes) -> str:
        return "; ".join(filter(None, (part.describe(data) for part in self._parts)))

    def facts(self, data: bytes) -> Facts:
        # Two conditions on the same name say it once.
        return tuple(dict.fromkeys(fact for part in self._parts for fact in part.facts(data)))

    def parts(self) -> Iterator[Matcher]:
        yield self
        for part in self._parts:
            yield from part.parts()


class All(_Several):
    """Matches when every part does."""

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        outcome = MATCH
        for part in self._parts:
            said = part.match(data, end, client, local_port)
            if said is NO_MATCH:
                return NO_MATCH
            if said is NEED_MORE:
                outcome = NEED_MORE
        return outcome

    def speaker(
        self, data: bytes, end: End, client: Address | None, local_port: int
    ) -> Speaker | None:
        for part in self._parts:
            speaker = part.speaker(data, end, client, local_port)
            if speaker is not None:
                return speaker
        return None

    @property
    def names_destination(self) -> bool:
        return any(part.names_destination for part in self._parts)

    @property
    def always(self) -> bool:
        return all(part.always for part in self._parts)

    def never(self, listener: ListenerFacts) -> str:
        return next(filter(None, (part.never(listener) for part in self._parts)), "")

    def in_kernel(self, local_port: int) -> Condition:
        return Every(tuple(part.in_kernel(local_port) for part in self._parts))


class AnyOf(_Several):
    """Matches when one part does."""

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        outcome = NO_MATCH
        for part in self._parts:
            said = part.match(data, end, client, local_port)
            if said is MATCH:
                return MATCH
            if said is NEED_MORE:
                outcome = NEED_MORE
        return outcome

    def speaker(
        self, data: bytes, end: End, client: Address | None, local_port: int
    ) -> Speaker | None:
        undecided = None
        for part in self._parts:
            said = part.match(data, end, client, local_port)
            if said is MATCH:
                return part.speaker(data, end, client, local_port)
            if said is NEED_MORE and undecided is None:
                undecided = part.speaker(data, end, client, local_port)
        return undecided

    @property
    def names_destination(self) -> bool:
        return all(part.names_destination for part in self._parts)

    @property
    def always(self) -> bool:
        return any(part.always for part in self._parts)

    def never(self, listener: ListenerFacts) -> str:
        why = [part.never(listener) for part in self._parts]
        return why[0] if all(why) else ""

    def in_kernel(self, local_port: int) -> Condition:
        return Some(tuple(part.in_kernel(local_port) for part in self._parts))


class Not(Matcher):
    """Matches when the part cannot any more."""

    def __init__(self, part: Matcher) -> None:
        self._part = part

    def match(self, data: bytes, end: End, client: Address | None, local_port: int) -> Outcome:
        said = self._part.match(data, end, client, local_port)
        if said is NEED_MORE:
            return NEED_MORE
        return NO_MATCH if said is MATCH else MATCH

    def ask(self, data: bytes) -> Send | None:
        return self._part.ask(data)

    def describe(self, data: bytes) -> str:
        return self._part.describe(data)

    @property
    def always(self) -> bool:
        return False  # not known: what can never match depends on the listener

    def never(self, listener: ListenerFacts) -> str:
        return "what stands under `not` always matches" if self._part.always else ""

    def in_kernel(self, local_port: int) -> Condition:
        return Negated(self._part.in_kernel(local_port))

    def parts(self) -> Iterator[Matcher]:
        yield self
        yield from self._part.parts()
