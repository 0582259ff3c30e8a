"""Which patterns an option may be given: those that its own parser can meet in a first packet.

A pattern outside of that would pass for a rule and never match.  So each option says here what its
values are made of, and the rest is refused with a hint.  Where a user writes a name in another form
than clients send it (`bücher.example`), the pattern becomes the one that they send.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyforwarder.core.address import MAX_NAME_LENGTH
from pyforwarder.core.first_packet.options import OptionError

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.options import Options

_HOST_NAME: Final = re.compile(r"[a-z0-9_.*-]*")
# What RFC 3986 section 3.2.2 allows in a host besides: registered names, and IPv6 in brackets.
_HTTP_HOST: Final = re.compile(r"[a-z0-9_.*!$&'()+,;=%~-]*|\[[0-9a-f:.*]+\]")
_METHOD: Final = re.compile(r"[A-Z*][A-Z_*-]{0,23}")
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_MAX_LABEL: Final = 63  # RFC 1035 section 2.3.4
_MAX_DNS_TYPE: Final = 65535
# Those that people route by, of IANA's registry of DNS parameters; others are written TYPE65280
# (RFC 3597 section 5).
DNS_TYPES: Final = {
    "A": 1,
    "NS": 2,
    "CNAME": 5,
    "SOA": 6,
    "NULL": 10,
    "PTR": 12,
    "HINFO": 13,
    "MX": 15,
    "TXT": 16,
    "RP": 17,
    "AFSDB": 18,
    "AAAA": 28,
    "LOC": 29,
    "SRV": 33,
    "NAPTR": 35,
    "CERT": 37,
    "DNAME": 39,
    "APL": 42,
    "DS": 43,
    "SSHFP": 44,
    "IPSECKEY": 45,
    "RRSIG": 46,
    "NSEC": 47,
    "DNSKEY": 48,
    "DHCID": 49,
    "NSEC3": 50,
    "NSEC3PARAM": 51,
    "TLSA": 52,
    "SMIMEA": 53,
    "CDS": 59,
    "CDNSKEY": 60,
    "OPENPGPKEY": 61,
    "CSYNC": 62,
    "ZONEMD": 63,
    "SVCB": 64,
    "HTTPS": 65,
    "SPF": 99,
    "IXFR": 251,
    "AXFR": 252,
    "ANY": 255,
    "URI": 256,
    "CAA": 257,
}

Convert = Callable[[str], tuple[str, ...]]


def _patterns(options: Options, key: str, convert: Convert) -> tuple[str, ...]:
    patterns: list[str] = []
    for text in options.texts(key):
        try:
            patterns += convert(text)
        except ValueError as error:
            raise OptionError(f"{text!r}: {error}", key) from None
    return tuple(patterns)


def dns_names(options: Options, key: str) -> tuple[str, ...]:
    """Patterns for names in DNS queries, where the empty one is the root.

    Raises:
        OptionError: as `host_names`.
    """

    def convert(text: str) -> tuple[str, ...]:
        return (_host_name(text, _HOST_NAME) if text not in ("", ".") else "",)

    return _patterns(options, key, convert)


def dns_types(options: Options, key: str) -> tuple[int, ...]:
    """Types of DNS records: by name, as TYPE65280, or by number.

    Raises:
        OptionError: no such type.
    """

    def convert(text: str) -> tuple[str, ...]:
        name = text.upper()
        if name in DNS_TYPES:
            return (str(DNS_TYPES[name]),)
        if "*" in name:
            raise ValueError("types are compared whole, without *; ANY is a type, too")
        number = name.removeprefix("TYPE")
        if not re.fullmatch("[0-9]{1,5}", number) or not 0 < int(number) <= _MAX_DNS_TYPE:
            near = difflib.get_close_matches(name, DNS_TYPES, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else "write A, AAAA and the like, or TYPE65280"
            )
            raise ValueError(f"is no type of record known here; {hint}")
        return (number,)

    return tuple(int(number) for number in _patterns(options, key, convert))


def host_names(options: Options, key: str) -> tuple[str, ...]:
    """Patterns for names as TLS carries them: lower case, xn-- forms, no final dot.

    Raises:
        OptionError: no client can send such a name; says what to write.
    """
    return _patterns(options, key, lambda text: (_host_name(text, _HOST_NAME),))


def http_hosts(options: Options, key: str) -> tuple[str, ...]:
    """The same for hosts of HTTP, which may be an IPv6 address in brackets, or empty.

    Raises:
        OptionError: as `host_names`.
    """
    return _patterns(options, key, lambda text: (_host_name(text, _HTTP_HOST) if text else "",))


def xmpp_domains(options: Options, key: str) -> tuple[str, ...]:
    """Patterns for XMPP domains: clients may send the letters themselves, or their xn-- form.

    Raises:
        OptionError: as `host_names`.
    """

    def convert(text: str) -> tuple[str, ...]:
        ascii_form = _host_name(text, _HTTP_HOST)
        letters = unicodedata.normalize("NFC", text).lower().removesuffix(".")
        return (ascii_form,) if letters.isascii() else (ascii_form, letters)

    return _patterns(options, key, convert)


def paths(options: Options, key: str) -> tuple[str, ...]:
    """Patterns for paths as they stand in a request line.

    Raises:
        OptionError: no request line has such a path.
    """
    return _patterns(options, key, lambda text: (_path(text),))


def methods(options: Options, key: str) -> tuple[str, ...]:
    """HTTP methods, which are compared as they are written (RFC 9110 section 9.1).

    Raises:
        OptionError: no method.
    """

    def convert(text: str) -> tuple[str, ...]:
        if "*" in text:
            raise ValueError("a method has no *; leave `method` out to take them all")
        if not _METHOD.fullmatch(text):
            upper = text.upper()
            hint = f"write {upper}" if _METHOD.fullmatch(upper) else "GET, POST and the like"
            raise ValueError(f"methods are capital letters: {hint}")
        return (text,)

    return _patterns(options, key, convert)


def header_name(text: str) -> str:
    """The name of an HTTP header in lower case.

    Raises:
        OptionError: no header has such a name.
    """
    if not _HEADER_NAME.fullmatch(text):
        hint = ": write the name without the colon" if text.rstrip().endswith(":") else ""
        raise OptionError(f"{text!r} is no name of a header{hint}", text)
    return text.lower()


def latin1_texts(options: Options, key: str) -> tuple[str, ...]:
    """Patterns for one line of bytes that are read as ISO 8859-1, without blanks around.

    Raises:
        OptionError: control characters, letters beyond U+00FF, or blanks at an end.
    """

    def convert(text: str) -> tuple[str, ...]:
        _refuse_control(text)
        if text != text.strip(" \t"):
            raise ValueError("blanks at its ends are not part of a value")
        beyond = next((letter for letter in text if ord(letter) > 0xFF), None)
        if beyond is not None:
            raise ValueError(f"{beyond!r} is not in ISO 8859-1; write * in its place")
        return (text,)

    return _patterns(options, key, convert)


def unicode_texts(options: Options, key: str) -> tuple[str, ...]:
    """Patterns for UTF-8 text that ends with a NUL or has a length.

    Raises:
        OptionError: a NUL in it, or half a character.
    """

    def convert(text: str) -> tuple[str, ...]:
        if "\0" in text:
            raise ValueError("has a NUL in it")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("is not UTF-8") from None
        return (text,)

    return _patterns(options, key, convert)


def alpn_names(options: Options, key: str) -> tuple[bytes, ...]:
    """Protocol names of RFC 7301: 1 to 255 bytes, compared as they are.

    Raises:
        OptionError: no such name.
    """

    def convert(text: str) -> tuple[str, ...]:
        if "*" in text:
            raise ValueError("ALPN names are compared whole, without *")
        if not 1 <= len(text.encode(errors="replace")) <= 255:
            raise ValueError("a name of ALPN has 1 to 255 bytes")
        if text.lower() in ("http/1.0", "http/1.1", "h2", "h2c", "h3") and text != text.lower():
            raise ValueError(f"clients write {text.lower()}")
        if "," in text or " " in text:
            raise ValueError("write several as a list: [h2, http/1.1]")
        return (text,)

    return tuple(name.encode() for name in _patterns(options, key, convert))


def _host_name(text: str, allowed: re.Pattern[str]) -> str:
    if "://" in text:
        raise ValueError("is a URL; the name alone stands here")
    name = text.removesuffix(".")
    if not name.isascii():
        name = ".".join(_ascii_label(label) for label in re.split("[.\u3002\uff0e\uff61]", name))
    name = name.lower()
    if not name:
        raise ValueError("is empty: no name has no letters")
    if name.startswith("."):
        raise ValueError(f"begins with a dot: write *{name} for all names below it")
    if ".." in name:
        raise ValueError("has an empty label: two dots in a row")
    if not allowed.fullmatch(name):
        if re.fullmatch(r"[^:/]+:[0-9*]+", name):
            raise ValueError(
                f"the name stands without the port: write {name.partition(':')[0]} "
                "(`port:` is a condition of its own)"
            )
        if "/" in name:
            raise ValueError("a name has no path")
        strange = next(letter for letter in name if not allowed.fullmatch(letter))
        raise ValueError(f"no name has {strange!r} in it")
    if len(name.replace("*", "")) > MAX_NAME_LENGTH:
        raise ValueError(f"a name has at most {MAX_NAME_LENGTH} characters")
    if any(len(label.replace("*", "")) > _MAX_LABEL for label in name.split(".")):
        raise ValueError(f"a label has at most {_MAX_LABEL} characters")
    return name


def _ascii_label(label: str) -> str:
    """The form of a label in which clients send it (UTS 46, as browsers do)."""
    if label.isascii():
        return label
    if "*" in label:
        raise ValueError(
            "beside letters that are not ASCII a * cannot stand in one label: names are sent "
            "in their xn-- form"
        )
    import idna  # its tables have two megabytes, and few rules need them

    try:
        return idna.encode(label, uts46=True).decode("ascii")
    except idna.IDNAError as error:
        raise ValueError(f"is no internationalized name ({error})") from None


def _path(text: str) -> str:
    _refuse_control(text)
    if " " in text:
        raise ValueError("a path has no blanks: write %20")
    if not text.isascii():
        escaped = "".join(
            letter if letter.isascii() else "".join(f"%{byte:02X}" for byte in letter.encode())
            for letter in text
        )
        raise ValueError(f"paths are compared as they are sent: write {escaped}")
    if "?" in text:
        raise ValueError("the query is no part of the path: leave out what begins with ?")
    if "#" in text:
        raise ValueError("clients send no fragment: leave out what begins with #")
    if not text.startswith(("/", "*")):
        raise ValueError(f"a path begins with a slash: write /{text}")
    return text


def _refuse_control(text: str) -> None:
    for letter in text:
        if ord(letter) < 0x20 or ord(letter) == 0x7F:
            raise ValueError("has a control character in it, which no client can send here")
