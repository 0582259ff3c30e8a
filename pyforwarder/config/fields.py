"""What keys of several sections may be: words, counts, lists, in the model's types."""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PlainSerializer, PlainValidator

from pyforwarder.config import values


def off_is_a_word(value: object) -> object:
    """`off`, which without quotes is false to every YAML 1.1 tool that may have written a file."""
    return "off" if value is False else value


def _keepalive_seconds(value: object) -> float:
    """What TCP_KEEPIDLE and TCP_KEEPINTVL take: 1 to 32767 s (MAX_TCP_KEEPIDLE)."""
    seconds = values.parse_timeout(value)
    if seconds != int(seconds) or seconds > 32767:
        raise ValueError(f"{values.describe(value)}: keepalives take whole seconds, 1s to 9h")
    return seconds


def _keepalive_idle(value: object) -> float:
    return 0.0 if values.parse_duration(value) == 0 else _keepalive_seconds(value)


KeepaliveIdle = Annotated[
    float,
    PlainValidator(_keepalive_idle),
    PlainSerializer(values.format_duration),
    values.Written("duration"),
]
KeepaliveInterval = Annotated[
    float,
    PlainValidator(_keepalive_seconds),
    PlainSerializer(values.format_duration),
    values.Written("duration over 0"),
]


def _workers(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 256:
        return value
    raise ValueError(f"{values.describe(value)} is neither auto nor 1 to 256")


def _name_list(value: object) -> tuple[str, ...]:
    return tuple(values.parse_name(item) for item in values.as_list(value))


def _endpoints(value: object) -> tuple[str, ...]:
    """URLs of a store's members, without a path."""
    found = []
    for text in values.as_list(value):
        written = str(text)
        parts = urlsplit(written)
        try:
            is_right = (
                parts.scheme in ("http", "https")
                and bool(parts.hostname)
                and parts.port is not None
                and not (parts.path.strip("/") or parts.query or parts.fragment or parts.username)
            )
        except ValueError:  # the port
            is_right = False
        if not is_right:
            raise ValueError(f"{text!r} is no endpoint: write http://10.0.0.1:2379 or https://...")
        found.append(written.rstrip("/"))
    if not found:
        raise ValueError("a store needs an endpoint")
    return tuple(found)


def _one_protocol(value: object) -> object:
    if isinstance(value, list) or (
        isinstance(value, str) and {"tcp", "udp"} <= set(re.findall("[a-z]+", value.lower()))
    ):
        raise ValueError(
            "a listener has one protocol: write two listeners, "
            "the second with the rules of the first (`rules: &rules [...]`, `rules: *rules`)"
        )
    return value


def _host_names(value: object) -> tuple[str, ...]:
    return tuple(values.parse_host_name(item) for item in values.as_list(value))


ListenerProtocol = Annotated[Literal["tcp", "udp"], BeforeValidator(_one_protocol)]
SendProxy = Annotated[Literal["off", "v1", "v2"], BeforeValidator(off_is_a_word)]
TokenUse = Annotated[Literal["required", "optional", "off"], BeforeValidator(off_is_a_word)]
Count = Annotated[int, Field(strict=True, ge=0, le=1 << 40)]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Endpoints = Annotated[tuple[str, ...], PlainValidator(_endpoints), values.Written("list of URLs")]
HostNames = Annotated[tuple[str, ...], PlainValidator(_host_names), values.Written("list of names")]
Names = Annotated[tuple[str, ...], PlainValidator(_name_list), values.Written("list of names")]
Workers = Annotated[int | Literal["auto"], PlainValidator(_workers), values.Written("auto, number")]
