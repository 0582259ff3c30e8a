"""Proofs that hold until the next boot: what has passed once needs no second self-test.

A proof is of one boot of one kernel, of these very programs and the code that steers them, and of
what this process may do. Anything else is proven anew; so is what has failed.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyforwarder.datapath.attach import choice
from pyforwarder.datapath.ebpf import probing, refusal
from pyforwarder.datapath.ebpf.loading import bpf_directory
from pyforwarder.runtime import host
from pyforwarder.runtime.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.datapath.proof.selftest import Proof

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_PASSED: Final = b"passed"


def proven(
    name: str, user: str | None, prove: Callable[[str | None], Proof], *, anew: bool
) -> Proof | None:
    """The proof of a datapath, made now; None: it has passed before, and is not asked for `anew`.

    Raises:
        LoadError: it has not passed; then or now.
    """
    store, key = Store.usual(), _key(name, user)
    if key is not None and not anew and store.get(key) == _PASSED:
        return None
    proof = prove(user)
    if key is not None:
        if proof.passed:
            store.put(key, _PASSED)
        else:
            store.forget(key)
    if not proof.passed:
        raise proof.error()
    return proof


def _key(name: str, user: str | None) -> str | None:
    """All that a proof depends on, in words; None: that cannot be said."""
    try:
        boot_id = _BOOT_ID.read_text().strip()
        code = _code()
        attach = choice.kind()
    except OSError:
        return None
    missing = [capability.name for capability in host.missing_capabilities(refusal.NETWORK)]
    return json.dumps(
        {
            "proof": name,
            "boot": boot_id,
            "kernel": list(os.uname())[2:],
            "code": code,
            "attach": attach,
            "user": [os.geteuid(), user],
            "missing": missing,
            "confined": host.has_seccomp_filter(),
            # Other programs are loaded where not; a running kernel can be locked down further.
            "reads_kernel": probing.reads_kernel(),
        },
        sort_keys=True,
    )


def _code() -> str:
    """The hash of the programs and of the code that steers them.

    Not of where they are: another copy of the same has been proven with this one.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for directory, pattern in ((_package(), "*.py"), (bpf_directory(), "*.[ch]")):
        for path in sorted(directory.rglob(pattern)):
            text = path.read_bytes()
            digest.update(f"{path.relative_to(directory)} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def _package() -> Path:
    return Path(__file__).resolve().parent.parent
