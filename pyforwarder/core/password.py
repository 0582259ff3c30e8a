"""Passwords that are kept as hashes: bcrypt (`$2b$`) and Argon2 (`$argon2id$`).

To verify one takes long on purpose, so nobody does it where others wait: `runtime.password_checks`.
Both libraries let other threads run meanwhile.
"""

from __future__ import annotations

import re
from typing import Final

# What crypt(5) and its like write: a method between dollars.
_HASH: Final = re.compile(rb"\$[0-9a-z-]{1,16}\$")
# A password of this form is hardly one; of the hash the shortest beginnings are enough.
_NAME_AND_HASH: Final = re.compile(rb"[^:\s]{1,255}:\$(?:2[abxy]|argon2(?:id|i|d)|apr1|[156y])\$")
_BCRYPT: Final = re.compile(rb"\$2[aby]\$([0-9]{2})\$[./A-Za-z0-9]{53}")
_ARGON2: Final = re.compile(
    rb"\$argon2(?:id|i|d)\$v=19\$m=([0-9]{1,9}),t=([0-9]{1,9}),p=([0-9]{1,9})"
    rb"\$[A-Za-z0-9+/]{11,128}\$[A-Za-z0-9+/]{11,256}"
)
# A worker verifies one at a time: this much of its memory, and a few seconds at the very most.
MOST_MEMORY_KIB: Final = 256 << 10
MOST_PASSES: Final = 32
MOST_LANES: Final = 16
MOST_ROUNDS: Final = 15
# bcrypt looks at no more, and its library refuses what is longer.
_BCRYPT_BYTES: Final = 72

# OWASP's recommendation for Argon2id with little memory.
_MEMORY_KIB: Final = 19 << 10
_PASSES: Final = 2
_LANES: Final = 1


def is_hash(stored: bytes) -> bool:
    """Whether this is no password, but the hash of one."""
    return _HASH.match(stored) is not None


def is_line_with_hash(stored: bytes) -> bool:
    """Whether this is a line as htpasswd(1) and its like write: a name, a colon, a hash."""
    return _NAME_AND_HASH.match(stored) is not None


def fault(stored: bytes) -> str:
    """What is wrong with a hash, in words for the operator; empty: nothing."""
    make = "make one with `pyforwarder password`"
    bcrypt = _BCRYPT.fullmatch(stored)
    if bcrypt is not None:
        rounds = int(bcrypt[1])
        if not 4 <= rounds <= MOST_ROUNDS:
            return f"bcrypt of {rounds} rounds takes too long (4 to {MOST_ROUNDS}): {make}"
        return ""
    argon2 = _ARGON2.fullmatch(stored)
    if argon2 is not None:
        memory_kib, passes, lanes = map(int, argon2.groups())
        if not 8 * lanes <= memory_kib <= MOST_MEMORY_KIB or not 1 <= lanes <= MOST_LANES:
            most = f"{MOST_MEMORY_KIB >> 10} MiB and {MOST_LANES} lanes"
            return f"Argon2 may have {most} at most: {make}"
        if not 1 <= passes <= MOST_PASSES:
            return f"Argon2 may have {MOST_PASSES} passes at most: {make}"
        return ""
    method = stored[1:].partition(b"$")[0].decode("ascii", "replace")
    if method.startswith(("2", "argon2")):
        return f"an incomplete hash: write all of it in one line, or {make}"
    return f"a hash by ${method}$ is not verified here, but $2b$ and $argon2id$ are: {make}"


def verify(stored: bytes, password: bytes) -> bool:
    """Whether this is the password of the hash, in which `fault` has found nothing."""
    if stored.startswith(b"$2"):
        import bcrypt

        try:
            return bcrypt.checkpw(password[:_BCRYPT_BYTES], stored)
        except ValueError:
            return False
    import argon2

    try:
        return argon2.PasswordHasher().verify(stored, password)
    except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
        return False


def make_hash(password: bytes) -> str:
    """A hash of the password, by Argon2id with a salt of its own."""
    import argon2

    hasher = argon2.PasswordHasher(time_cost=_PASSES, memory_cost=_MEMORY_KIB, parallelism=_LANES)
    return hasher.hash(password)
