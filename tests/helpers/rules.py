"""Compiled rules from what stands in a configuration, without a configuration around them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pyforwarder.config import Listener
from pyforwarder.core.rule_compiling import compile_rules

if TYPE_CHECKING:
    from pyforwarder.core.routing import Ruleset
    from pyforwarder.core.token import TokenKeys


def ruleset(
    *rules: Mapping[str, object],
    keys: TokenKeys | None = None,
    passwords: Mapping[str, bytes] | None = None,
) -> Ruleset:
    """The rules of one TCP listener, each as YAML has it."""
    listener = Listener.model_validate(
        {"bind": "127.0.0.1:9999", "rules": [dict(r) for r in rules]}
    )
    return compile_rules(listener, keys, passwords=passwords)
