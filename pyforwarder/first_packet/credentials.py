"""Who may use a proxy protocol, for those that ask for a name and a password."""

from __future__ import annotations

import hmac
from collections.abc import Mapping


class Users:
    """Names and passwords.  Comparing takes as long for an unknown name as for a known one."""

    def __init__(self, passwords: Mapping[str, bytes]) -> None:
        self._passwords = {name.encode(): password for name, password in passwords.items()}

    def accept(self, name: bytes, password: bytes) -> bool:
        """Whether this is the password of this user."""
        wanted = self._passwords.get(name)
        # As digests, which all have one length: else the time would show how long the password is.
        is_equal = hmac.compare_digest(_digest(password), _digest(wanted or b""))
        return is_equal and wanted is not None


def _digest(password: bytes) -> bytes:
    return hmac.digest(b"pyforwarder", password, "sha256")
