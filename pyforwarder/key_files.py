"""Read the key files that a configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyforwarder.errors import ConfigError
from pyforwarder.token import TokenKeys, UsedTokens, key_from_file

if TYPE_CHECKING:
    from pyforwarder.config import Config


def load_token_keys(config: Config) -> TokenKeys | None:
    """The keys of signed instructions as the files hold them now; None if there are none.

    Raises:
        ConfigError: a file cannot be read, or its key is too short; names `tokens.keys.ID`.
    """
    tokens = config.tokens
    keys = {}
    for key_id, path in tokens.keys.items():
        try:
            keys[key_id] = key_from_file(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}", path=f"tokens.keys.{key_id}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}", path=f"tokens.keys.{key_id}") from error
    if not keys:
        return None
    return TokenKeys(
        keys,
        clock_skew_s=tokens.clock_skew_s,
        used=UsedTokens() if tokens.single_use else None,
    )
