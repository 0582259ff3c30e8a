"""The users of a proxy protocol that asks for a name and a password."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from pyforwarder.core.first_packet.outcome import Decision, Verify
from pyforwarder.core.password import is_hash

if TYPE_CHECKING:
    from pyforwarder.core.first_packet.outcome import Refuse


# The cause of a refusal, for the log.
TOO_MANY_PASSWORDS: Final = "too many passwords are being verified"


class Users:
    """Names and passwords, or the hashes of passwords.

    Comparing takes as long for an unknown name as for a known one.
    """

    def __init__(self, passwords: Mapping[str, bytes]) -> None:
        self._passwords = {name.encode(): password for name, password in passwords.items()}
        # What the password of an unknown user is compared with, in vain.
        self._hash = next(filter(is_hash, self._passwords.values()), b"")

    def decide(
        self,
        name: bytes,
        password: bytes,
        *,
        right: Callable[[], Decision],
        wrong: Refuse,
        busy: Refuse,
    ) -> Decision:
        """`right()` if this is the password of this user, else `wrong`.

        A hash is left to callers that can wait; `busy` is for when there is none.
        """
        wanted = self._passwords.get(name)
        stored = self._hash if wanted is None else wanted
        if is_hash(stored):
            is_known = wanted is not None
            return Verify(
                stored, password, lambda is_it: right() if is_it and is_known else wrong, busy
            )
        # As digests, which all have one length: else the time would show how long the password is.
        is_equal = hmac.compare_digest(_digest(password), _digest(stored))
        return right() if is_equal and wanted is not None else wrong


def _digest(password: bytes) -> bytes:
    return hmac.digest(b"pyforwarder", password, "sha256")
