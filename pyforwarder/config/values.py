"""Single values of the configuration: what may be written, and what it becomes.

Every parser takes whatever YAML gave and raises `ValueError` with a sentence for the user; the
annotated types at the end are what the models use.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import Field, PlainValidator

from pyforwarder import address, policy

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
        ValueError: no name, or a colon in it.
    """
    name = parse_name(value)
    if ":" in name:
        raise ValueError(f"{name!r}: an upstream's name has no colon")
    return name


def _text(value: object, what: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, dict)):
        raise ValueError(f"{what} is text, not {describe(value)}; [ip6]:port needs quotes in YAML")
    raise ValueError(f"{what} is text, not {describe(value)}")


def parse_bind(value: object) -> address.Address | address.UnixAddress:
    """Where a listener binds; see `address.parse_bind`."""
    return address.parse_bind(_text(value, "an address to bind"))


def parse_tcp_bind(value: object) -> address.Address:
    """Like `parse_bind`, without unix sockets."""
    bind = parse_bind(value)
    if isinstance(bind, address.UnixAddress):
        raise ValueError("a unix socket cannot be used here")
    return bind


def parse_server(value: object) -> address.Address | address.HostPort | address.UnixAddress:
    """A server's address; see `address.parse_server`."""
    return address.parse_server(_text(value, "a server"))


def parse_to(value: object) -> address.Address | address.HostPort | address.UnixAddress | str:
    """A server's address, or an upstream's name (text without a colon)."""
    text = _text(value, "to")
    return address.parse_server(text) if ":" in text else parse_upstream_name(text)


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
            result.append(str(policy.parse_ip(text)))
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


Duration = Annotated[float, PlainValidator(parse_duration)]
Timeout = Annotated[float, PlainValidator(parse_duration), Field(gt=0)]  # every wait has an end
Size = Annotated[int, PlainValidator(parse_size)]
Name = Annotated[str, PlainValidator(parse_name)]
UpstreamName = Annotated[str, PlainValidator(parse_upstream_name)]
Bind = Annotated[address.Address | address.UnixAddress, PlainValidator(parse_bind)]
TcpBind = Annotated[address.Address, PlainValidator(parse_tcp_bind)]
ServerAddress = Annotated[
    address.Address | address.HostPort | address.UnixAddress, PlainValidator(parse_server)
]
To = Annotated[
    address.Address | address.HostPort | address.UnixAddress | str, PlainValidator(parse_to)
]
Allow = Annotated[policy.AllowList, PlainValidator(parse_allow)]
NetworkSet = Annotated[policy.Networks, PlainValidator(parse_networks)]
IpList = Annotated[tuple[str, ...], PlainValidator(parse_ip_list)]
File = Annotated[Path, PlainValidator(parse_file)]
Switch = Annotated[bool, PlainValidator(parse_switch)]
Mode = Annotated[int, PlainValidator(parse_mode)]
