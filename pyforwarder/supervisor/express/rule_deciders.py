"""Who decides by each rule, the kernel or userspace, and why: what `show rules` says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pyforwarder.config import Listener

# A listener and one of its rules.
RuleName = tuple[str, str]


@dataclass(frozen=True, slots=True)
class RuleDecider:
    """Who decides by a rule, at all the addresses of its listener."""

    is_in_kernel: bool  # at one at least
    why_not: str  # at others, or at all; empty: nowhere

    @property
    def decided(self) -> str:
        """Who decides, in the word of `show rules`."""
        if not self.is_in_kernel:
            return "user"
        return "partly" if self.why_not else "kernel"


USERSPACE: Final = RuleDecider(is_in_kernel=False, why_not="")


class RuleDeciders:
    """Puts together what is found address by address."""

    def __init__(self) -> None:
        self.of: dict[RuleName, RuleDecider] = {}

    def add(self, listener: str, reasons: Mapping[str, str]) -> None:
        """Add what was found at another address: for each rule why userspace decides; empty: the
        kernel does.
        """
        for rule, why in reasons.items():
            before = self.of.get((listener, rule))
            self.of[listener, rule] = RuleDecider(
                is_in_kernel=not why or (before is not None and before.is_in_kernel),
                why_not=(before.why_not if before is not None else "") or why,
            )

    def add_all(self, listener: Listener, why: str) -> None:
        """Add the same reason for all rules of a listener."""
        self.add(listener.name, {rule.name: why for rule in listener.rules})
