"""Read the files with keys and passwords that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.errors import ConfigError
from pyforwarder.token import TokenKeys, key_from_file

if TYPE_CHECKING:
    from pyforwarder.config import Config


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
            raise ConfigError(f"{path}: {error.strerror}", path=f"tokens.keys.{key_id}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}", path=f"tokens.keys.{key_id}") from error
    return keys


def read_passwords(config: Config) -> dict[str, bytes]:
    """The passwords of users as the files hold them now, without one final newline, by their names.

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
            raise ConfigError(f"{path}: {error.strerror}", path=at) from error
        # RFC 1929 counts a password in one byte.
        if not 1 <= len(password) <= 255:
            raise ConfigError(f"{path}: a password has 1 to 255 bytes", path=at)
        passwords[name] = password
    return passwords


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
        max_lifetime_s=tokens.max_lifetime_s,
    )
