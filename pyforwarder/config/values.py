"""Single values of the configuration: what may be written, and what it becomes.

Every parser takes any value of YAML and raises `ValueError` with a sentence for the user; the
annotated types at the end are what the models use.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import PlainSerializer, PlainValidator

from pyforwarder.core import address, policy, token
from pyforwarder.core.first_packet.naming import SOURCES

if TYPE_CHECKING:
    from collections.abc import Iterable

_DURATION_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION_PART: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")
_DURATION: Final = re.compile(rf"(?:{_DURATION_PART.pattern})+")
# Beyond this a timeout is a typo; it also keeps nanoseconds far inside 64 bits.
MAX_DURATION_S: Final = 366 * 86400.0

_SIZE_UNITS: Final = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZE: Final = re.compile(r"([0-9]{1,18})(B|KiB|MiB|GiB)")
MAX_SIZE_BYTES: Final = 1 << 40

_NAME: Final = re.compile(r"[!-~]{1,63}")


@dataclass(frozen=True, slots=True)
class Written:
    """What the reference calls the values of an annotated type: kinds, or words, with commas."""

    kinds: str


def describe(value: object) -> str:
    """A value as an error message quotes it: short, and with its kind when that is the mistake."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            text = repr(value)
            return text if len(text) <= 60 else f"{text[:57]}..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` when a known word is close, else the known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(known)}" if known else ""


def parse_duration(value: object) -> float:
    """Seconds from `250ms`, `5s`, `1h30m`; a bare number has no unit and is refused, except 0.

    Raises:
        ValueError: something else, or more than a year.
    """
    if value == 0 and not isinstance(value, bool):
        return 0.0
    if isinstance(value, str) and _DURATION.fullmatch(value):
        parts = _DURATION_PART.findall(value)
        seconds = sum(float(number) * _DURATION_UNITS_S[unit] for number, unit in parts)
        if seconds > MAX_DURATION_S:
            raise ValueError(f"{value} is longer than a year")
        return seconds
    hint = f": did you mean {value}s?" if _is_number(value) else ""
    raise ValueError(f"{describe(value)} is no duration like 250ms, 5s or 1h{hint}")


def parse_timeout(value: object) -> float:
    """A duration that is not 0: every wait has an end.

    Raises:
        ValueError: 0, or no duration.
    """
    duration = parse_duration(value)
    if duration == 0:
        longest = f"{MAX_DURATION_S / 86400:.0f}d"
        raise ValueError(
            f"must be greater than 0, not {describe(value)}: every wait has an end; write a "
            f"duration up to {longest}"
        )
    return duration


def parse_timeout_or_off(value: object) -> float | Literal["off"]:
    """A duration that is not 0, or `off`.

    Raises:
        ValueError: 0, or neither.
    """
    # An unquoted `off` is false to every YAML 1.1 tool that may have written this file.
    if value is False or value == "off":
        return "off"
    try:
        return parse_timeout(value)
    except ValueError as error:
        raise ValueError(f"{error}, or off") from None


def parse_size(value: object) -> int:
    """Bytes from `16KiB`, `1MiB` or a bare number of bytes.

    Raises:
        ValueError: something else, or more than 1024 GiB.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        size = int(match[1]) * _SIZE_UNITS[match[2]]
    else:
        hint = ""
        if isinstance(value, str) and (
            match := re.fullmatch(r"([0-9]+) ?([kKmMgG])i?[bB]?", value)
        ):
            hint = f": did you mean {match[1]}{match[2].upper()}iB?"
        raise ValueError(f"{describe(value)} is no size like 16KiB or 1MiB{hint}")
    if not 0 <= size <= MAX_SIZE_BYTES:
        raise ValueError(f"{describe(value)} is out of range")
    return size


def parse_mode(value: object) -> int:
    """The permissions of a file from its octal digits, `0660` or `660`.

    Raises:
        ValueError: something else, or more than permissions.
    """
    # Digits without a leading 0 have become a number on the way here; what was meant is the digits.
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch("0?[0-7]{3}", text):
        raise ValueError(f"{describe(value)} is no mode like 0660")
    return int(text, 8)


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"[0-9]+(\.[0-9]+)?", value) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def parse_name(value: object) -> str:
    """A name that fits one column of `show` and a label: 1 to 63 printable ASCII, no blanks.

    Raises:
        ValueError: anything else, or `-`, which `show` prints for "none".
    """
    if not isinstance(value, str):
        raise ValueError(f"a name is text, not {describe(value)}: write it in quotes")
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{describe(value)}: a name has 1 to 63 printable ASCII characters, no blanks"
        )
    if value == "-":
        raise ValueError("'-' stands for 'none' and is no name")
    return value


def parse_upstream_name(value: object) -> str:
    """A name without colon, since a colon makes a `to:` an address.

    Raises:
        ValueError: no name, or a colon in it, or a word that means something else in `to:`.
    """
    name = parse_name(value)
    if name in SOURCES:
        raise ValueError(
            f"{name!r} means the name in the first packet: call the upstream otherwise"
        )
    if ":" in name:
        raise ValueError(f"{name!r}: an upstream's name has no colon")
    return name


def _text(value: object, what: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, dict)):
        raise ValueError(f"{what} is text, not {describe(value)}; [ip6]:port needs quotes in YAML")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535:
        raise ValueError(
            f"{what} is text, not {value}: write 127.0.0.1:{value} for this host"
            + (f", or 0.0.0.0:{value} for all its IPv4 addresses" if "bind" in what else "")
        )
    raise ValueError(f"{what} is text, not {describe(value)}")


def parse_bind(value: object) -> address.Address | address.UnixAddress:
    """Where a listener binds; see `address.parse_bind`."""
    return address.parse_bind(_text(value, "an address to bind"))


def parse_binds(value: object) -> tuple[address.BindEntry, ...]:
    """Where a listener binds, one entry or a list of them; see `address.parse_bind_entry`.

    Raises:
        ValueError: one of them is none, or there is none.
    """
    entries = tuple(
        address.parse_bind_entry(_text(item, "an address to bind")) for item in as_list(value)
    )
    if not entries:
        raise ValueError("an empty list binds nothing: write for example 127.0.0.1:9999")
    return entries


def parse_tcp_bind(value: object) -> address.Address:
    """Like `parse_bind`, without unix sockets."""
    bind = parse_bind(value)
    if isinstance(bind, address.UnixAddress):
        raise ValueError("a unix socket cannot be used here")
    return bind


def parse_server(value: object) -> address.ServerAddress:
    """A server's address; see `address.parse_configured_server`."""
    return address.parse_configured_server(_text(value, "a server"))


def parse_to(value: object) -> address.ServerAddress | address.NameIn | str:
    """A server's address, an upstream's name (text without a colon), `sni` or `host`."""
    if isinstance(value, address.NameIn):
        return value
    text = _text(value, "to")
    if text in SOURCES:
        return address.NameIn(text, SOURCES[text].default_port)
    return address.parse_configured_server(text) if ":" in text else parse_upstream_name(text)


def parse_host_name(value: object) -> str:
    """The name of a host as browsers say it, in lower case and without a port.

    Raises:
        ValueError: something else.
    """
    text = _text(value, "a host's name")
    if not address.is_name(text):
        raise ValueError(
            f"{describe(value)} is no host's name: write it without port and `http://`"
        )
    return text.lower()


def as_list(value: object) -> list[object]:
    """What stands in a list, or alone instead of a list of one."""
    return list(value) if isinstance(value, list) else [value]


def _texts(value: object, what: str) -> list[str]:
    texts = []
    for item in as_list(value):
        if isinstance(item, (list, dict)):
            raise ValueError(f"{what} is text, not {describe(item)}; write [ip6]:port in quotes")
        # 443 in `[10.0.0.0/8:80,443]`: the comma split the entry; the parser says so.
        texts.append(item if isinstance(item, str) else describe(item))
    return texts


def parse_allow(value: object) -> policy.AllowList:
    """Destinations a client may name; see `policy.AllowList.parse`.

    Raises:
        ValueError: an entry that is none, or no entry at all.
    """
    texts = _texts(value, "an entry of allow")
    if not texts:
        raise ValueError(
            "an empty list allows nothing: write loopback, private, public, any or networks"
        )
    return policy.AllowList.parse(texts)


def parse_networks(value: object) -> policy.Networks:
    """A set of networks; see `policy.Networks.parse`."""
    return policy.Networks.parse(_texts(value, "a network"))


def parse_ip_list(value: object) -> tuple[str, ...]:
    """Numeric addresses in canonical form.

    Raises:
        ValueError: one of them is none.
    """
    result = []
    for text in _texts(value, "an address"):
        try:
            result.append(address.ip_text(policy.parse_ip(text)))
        except ValueError:
            raise ValueError(f"{text!r} is not a numeric address") from None
    return tuple(result)


def parse_file(value: object) -> Path:
    """An absolute path: the daemon's working directory is no place to look for keys.

    Raises:
        ValueError: not text, or relative.
    """
    text = _text(value, "a file")
    if not text.startswith("/") or "\0" in text:
        raise ValueError(f"{describe(text)} is not an absolute path")
    return Path(text)


def parse_directories(value: object) -> tuple[str, ...]:
    """Return the directories: one, or several in a list.

    Raises:
        ValueError: one of them is not text.
    """
    return tuple(_text(item, "a directory") for item in as_list(value))


def parse_switch(value: object) -> bool:
    """A yes or no, in any of YAML's words for it.

    Raises:
        ValueError: something else.
    """
    if isinstance(value, bool):
        return value
    match value:
        case "on" | "On" | "ON" | "yes" | "Yes" | "YES":
            return True
        case "off" | "Off" | "OFF" | "no" | "No" | "NO":
            return False
    raise ValueError(f"{describe(value)} is neither true nor false")


def parse_switch_or_optional(value: object) -> bool | Literal["optional"]:
    """A yes, a no, or `optional`.

    Raises:
        ValueError: something else.
    """
    if value == "optional":
        return "optional"
    try:
        return parse_switch(value)
    except ValueError as error:
        raise ValueError(f"{error}, nor optional") from None


def parse_audience(value: object) -> str:
    """A gateway's name, as signed instructions carry it in `aud=`.

    Raises:
        ValueError: not text, or no such name.
    """
    return token.parse_audience(_text(value, "a gateway's name"))


def format_duration(seconds: float) -> str | int:
    """Write seconds as `parse_duration` takes them, in the largest unit in which they are a whole
    number.
    """
    if seconds == 0:
        return 0
    for unit, length_s in sorted(_DURATION_UNITS_S.items(), key=lambda item: -item[1]):
        count = seconds / length_s
        if 0 < round(count) < 10**9 and abs(count - round(count)) < 1e-9 * count:
            return f"{round(count)}{unit}"
    whole_s, rest_s = divmod(seconds, 1)
    milliseconds = f"{rest_s * 1000:.6f}".rstrip("0").rstrip(".") + "ms"
    return f"{whole_s:.0f}s{milliseconds}" if whole_s else milliseconds


def format_timeout_or_off(seconds: float | Literal["off"]) -> str | int:
    """Write a timeout as `parse_timeout_or_off` takes it."""
    return seconds if seconds == "off" else format_duration(seconds)


def format_size(size: int) -> str | int:
    """Write a size as `parse_size` takes it, in the largest unit in which it is a whole number."""
    for unit, length in sorted(_SIZE_UNITS.items(), key=lambda item: -item[1]):
        if size and size % length == 0:
            return f"{size // length}{unit}"
    return size


def format_entries(entries: policy.AllowList | policy.Networks) -> list[str]:
    """The entries as they were written."""
    return list(entries.entries)


def format_binds(binds: tuple[address.BindEntry, ...]) -> str | list[str]:
    """Write addresses as `parse_binds` takes them."""
    return str(binds[0]) if len(binds) == 1 else list(map(str, binds))


def format_to(to: address.ServerAddress | address.NameIn | str) -> str:
    """Write a destination as `parse_to` takes it; the port of a name is a key of its own."""
    return to.where if isinstance(to, address.NameIn) else str(to)


def format_mode(mode: int) -> str:
    """The octal digits of permissions."""
    return f"{mode:04o}"


# What a value becomes, how `check --dump` writes it, and what the reference calls it.
Duration = Annotated[
    float, PlainValidator(parse_duration), PlainSerializer(format_duration), Written("duration")
]
Timeout = Annotated[
    float,
    PlainValidator(parse_timeout),
    PlainSerializer(format_duration),
    Written("duration over 0"),
]
TimeoutOrOff = Annotated[
    float | Literal["off"],
    PlainValidator(parse_timeout_or_off),
    PlainSerializer(format_timeout_or_off),
    Written("duration over 0, off"),
]
Size = Annotated[int, PlainValidator(parse_size), PlainSerializer(format_size), Written("size")]
Name = Annotated[str, PlainValidator(parse_name), Written("name")]
Audience = Annotated[str, PlainValidator(parse_audience), Written("name")]
UpstreamName = Annotated[str, PlainValidator(parse_upstream_name), Written("name")]
Binds = Annotated[
    tuple[address.BindEntry, ...],
    PlainValidator(parse_binds),
    PlainSerializer(format_binds),
    Written("list of addresses"),
]
TcpBind = Annotated[
    address.Address, PlainValidator(parse_tcp_bind), PlainSerializer(str), Written("address")
]
ServerAddress = Annotated[
    address.ServerAddress,
    PlainValidator(parse_server),
    PlainSerializer(str),
    Written("address"),
]
To = Annotated[
    address.ServerAddress | address.NameIn | str,
    PlainValidator(parse_to),
    PlainSerializer(format_to),
    Written("address, upstream, sni, host"),
]
Allow = Annotated[
    policy.AllowList,
    PlainValidator(parse_allow),
    PlainSerializer(format_entries),
    Written("list of networks"),
]
NetworkSet = Annotated[
    policy.Networks,
    PlainValidator(parse_networks),
    PlainSerializer(format_entries),
    Written("list of networks"),
]
IpList = Annotated[tuple[str, ...], PlainValidator(parse_ip_list), Written("list of IP addresses")]
File = Annotated[Path, PlainValidator(parse_file), PlainSerializer(str), Written("file")]
Directories = Annotated[
    tuple[str, ...], PlainValidator(parse_directories), Written("list of directories")
]
Switch = Annotated[bool, PlainValidator(parse_switch), Written("true, false")]
SwitchOrOptional = Annotated[
    bool | Literal["optional"],
    PlainValidator(parse_switch_or_optional),
    Written("true, false, optional"),
]
Mode = Annotated[
    int, PlainValidator(parse_mode), PlainSerializer(format_mode), Written("permissions")
]
