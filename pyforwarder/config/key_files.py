"""Read the files with keys and passwords that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.core.password import fault, is_hash, is_line_with_hash
from pyforwarder.core.token import TokenKeys, key_from_file
from pyforwarder.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from pyforwarder.config import Config
    from pyforwarder.config.document import Node


def read_keys(config: Config) -> dict[str, bytes]:
    """The keys of signed instructions as the files hold them now, by their ids.

    Raises:
        ConfigError: a file cannot be read, or its key is too short; names `tokens.keys.ID`.
    """
    keys = {}
    for key_id, path in config.tokens.keys.items():
        try:
            keys[key_id] = key_from_file(path.read_bytes())
        except OSError as error:
            reason = _unread(path, error, f"pyforwarder token --new {path}")
            raise ConfigError(reason, path=f"tokens.keys.{key_id}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}", path=f"tokens.keys.{key_id}") from error
    return keys


def read_passwords(config: Config) -> dict[str, bytes]:
    """The passwords of users as the files hold them now, without one final newline, by their names.

    Or hashes of them, see `core.password`.

    Raises:
        ConfigError: a file cannot be read, or is empty, or too long for a client to say; names
            `users.NAME`.
    """
    passwords = {}
    for name, path in config.users.items():
        at = f"users.{name}"
        try:
            password = path.read_bytes().removesuffix(b"\n")
        except OSError as error:
            reason = _unread(path, error, f"pyforwarder password > {path}")
            raise ConfigError(reason, path=at) from error
        if is_line_with_hash(password):
            raise ConfigError(
                f"{path}: a line of htpasswd: write what stands behind its colon, the hash alone",
                path=at,
            )
        # RFC 1929 counts a password in one byte.
        if not 1 <= len(password) <= 255:
            raise ConfigError(f"{path}: a password has 1 to 255 bytes", path=at)
        if is_hash(password) and (wrong := fault(password)):
            raise ConfigError(f"{path}: {wrong}", path=at)
        passwords[name] = password
    return passwords


def _unread(path: Path, error: OSError, make: str) -> str:
    reason = f"{path}: {error.strerror}"
    return f"{reason}; make it with `{make}`" if isinstance(error, FileNotFoundError) else reason


def placed(error: ConfigError, document: Node, *, source: str) -> ConfigError:
    """Return the error with the file and the line where its key stands."""
    section, _, name = error.path.partition(".")
    # What an operator has named stands whole: a user's name may have a dot.
    at = (section, *name.split(".", 1)) if section in ("tokens", "fleet") else (section, name)
    file, path, line = document.place(at)
    return ConfigError(error.reason, path=path, line=line, source=file or source)


def load_token_keys(config: Config) -> TokenKeys | None:
    """The keys as a set to verify with, which remembers no used token; None if there are no keys.

    Raises:
        ConfigError: as `read_keys`.
    """
    keys = read_keys(config)
    tokens = config.tokens
    if not keys:
        return None
    return TokenKeys(
        keys,
        clock_skew_s=tokens.clock_skew_s,
        max_lifetime_s=tokens.longest_life_s,
        audience=tokens.audience,
        audience_required=tokens.audience_required,
    )
