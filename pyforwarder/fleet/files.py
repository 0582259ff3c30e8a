"""The files that `fleet` names, read and understood: what the store is shown, and how it is known.

They are read while they may be, as root: the process that speaks to the store has no privileges.
"""

from __future__ import annotations

import os
import ssl
import stat
from typing import TYPE_CHECKING, Final, NamedTuple

from pyforwarder.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from pyforwarder.config import Fleet
    from pyforwarder.config.fleet import FleetTls

# A bundle of all authorities of a distribution has a quarter of this.
_MOST_BYTES: Final = 1 << 20
_MOST_PASSWORD_BYTES: Final = 4096


class Credentials(NamedTuple):
    """Our name and password for the store."""

    user: str
    password: str


class StoreFiles(NamedTuple):
    """What was in the files; None: none was named."""

    credentials: Credentials | None
    context: ssl.SSLContext | None


def read_files(fleet: Fleet) -> StoreFiles:
    """What the files have.

    Raises:
        ConfigError: one cannot be read or used; it says which, and why.
    """
    credentials = None
    if fleet.password is not None:
        password = _text(fleet.password, "fleet.password", _MOST_PASSWORD_BYTES).removesuffix("\n")
        if not password or "\n" in password:
            reason = "is empty" if not password else "has several lines"
            raise ConfigError(f"{fleet.password}: {reason}", path="fleet.password")
        credentials = Credentials(fleet.user, password)
    return StoreFiles(credentials, None if fleet.tls is None else _context(fleet.tls))


def _context(tls: FleetTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # asks for a certificate, and for its names
    authority = _text(tls.ca, "fleet.tls.ca", _MOST_BYTES)
    try:
        context.load_verify_locations(cadata=authority)
    except (ssl.SSLError, ValueError) as error:
        reason = f"{tls.ca}: no certificate in PEM that can be read"
        raise ConfigError(reason, path="fleet.tls.ca") from error
    if tls.cert is not None and tls.key is not None:
        _load_own(context, tls.cert, tls.key)
    return context


def _load_own(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    text = _text(certificate, "fleet.tls.cert", _MOST_BYTES)
    if "-----BEGIN CERTIFICATE-----" not in text:
        raise ConfigError(f"{certificate}: no certificate in PEM", path="fleet.tls.cert")
    if "PRIVATE KEY-----" not in _text(key, "fleet.tls.key", _MOST_BYTES):
        raise ConfigError(f"{key}: no private key in PEM", path="fleet.tls.key")
    asked = []

    def no_passphrase() -> str:
        # Else OpenSSL would ask at the terminal.
        asked.append(True)
        return ""

    try:
        context.load_cert_chain(certificate, key, password=no_passphrase)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        if asked:
            reason = f"{key}: has a passphrase, and nobody is there to type it"
        elif getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            reason = f"{key}: is not the key of {certificate}"
        else:
            reason = f"{key}, {certificate}: {_short(error)}"
        raise ConfigError(reason, path="fleet.tls.key") from error


def _text(path: Path, key: str, most_bytes: int) -> str:
    try:
        # What is no file (a FIFO) must not be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ConfigError(f"{path}: no file", path=key)
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", path=key) from error
    if len(content) > most_bytes:
        raise ConfigError(f"{path}: longer than {most_bytes} bytes", path=key)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8", path=key) from error


def _short(error: Exception) -> str:
    reason: str | None = getattr(error, "reason", None)
    return reason or getattr(error, "strerror", None) or str(error)
