"""The rules of a listener's configuration are compiled to those that routing.py applies.

Pure: keys and passwords have been read by the caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pyforwarder.core.address import NameIn
from pyforwarder.core.first_packet.credentials import Users
from pyforwarder.core.first_packet.instruction import TokenUse
from pyforwarder.core.first_packet.matcher import Speaker
from pyforwarder.core.first_packet.options import OptionError
from pyforwarder.core.first_packet.outcome import Refuse, Route, Rule
from pyforwarder.core.first_packet.table import Terms, build
from pyforwarder.core.reasons import CloseReason
from pyforwarder.core.routing import Combined, Entry, Fixed, Ruleset, Spoken, ToName
from pyforwarder.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pyforwarder.core.address import ServerAddress
    from pyforwarder.core.policy import AllowList
    from pyforwarder.core.token import TokenKeys


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
    def to(self) -> ServerAddress | NameIn | str | None: ...
    @property
    def reject(self) -> str | None: ...
    @property
    def datapath(self) -> str | None: ...


class ListenerConfig(Protocol):
    """What is read of a listener's configuration."""

    @property
    def protocol(self) -> str: ...
    @property
    def rules(self) -> Sequence[RuleConfig]: ...


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
    datagrams = listener.protocol == "udp"
    entries = tuple(
        _compile_rule(
            config,
            index,
            keys,
            passwords or {},
            f"{path}.rules[{index}]",
            datagrams=datagrams,
        )
        for index, config in enumerate(listener.rules)
    )
    return Ruleset(entries, datagrams=datagrams)


def _compile_rule(
    config: RuleConfig,
    index: int,
    keys: TokenKeys | None,
    passwords: Mapping[str, bytes],
    path: str,
    *,
    datagrams: bool,
) -> Entry:
    rule = Rule(
        name=config.name or f"rule-{index + 1}",
        index=index,
        allow=config.allow,
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
        datagrams=datagrams,
    )
    try:
        matcher = build(config.match, terms)
    except OptionError as error:
        below = error.key if not error.key or error.key.startswith("[") else f".{error.key}"
        raise ConfigError(error.reason, path=f"{path}.match{below}") from None
    if rule.to is not None and rule.reject is not None:
        raise ConfigError("says both `to` and `reject`", path=path)
    if isinstance(rule.to, NameIn):
        if rule.allow is None:
            raise ConfigError("goes where the client says and must say `allow`", path=path)
        return ToName(rule, matcher, rule.to, datagrams=datagrams)
    if rule.to is not None:
        return Fixed(rule, matcher, Route(rule, rule.to, 0, None, named_by_client=False))
    if rule.reject is not None:
        refusal = Refuse(
            rule,
            CloseReason.REJECTED,
            b"",
            reset=rule.reject == "reset",
            cause=f"the rule says `reject: {rule.reject}`",
        )
        return Fixed(rule, matcher, refusal)
    if not matcher.names_destination:
        raise ConfigError("says neither `to` nor `reject`, and the client cannot say it", path=path)
    if rule.allow is None:
        raise ConfigError("lets the client name the destination and must say `allow`", path=path)
    return Spoken(rule, matcher) if isinstance(matcher, Speaker) else Combined(rule, matcher)


def _users(names: Sequence[str], passwords: Mapping[str, bytes], path: str) -> Users | None:
    for name in names:
        if name not in passwords:
            raise ConfigError(f"no password of a user {name!r} was read", path=f"{path}.users")
    return Users({name: passwords[name] for name in names}) if names else None
