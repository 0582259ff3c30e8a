"""Compile and load BPF C files, in a child process, into plain file descriptors.

The child is _bcc.py; this end never imports bcc, so `pyforwarder copy`-only hosts need none.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from pyforwarder.errors import LoadError

ProgramKind = Literal["sk_skb", "sched_cls", "map_iterator", "socket_iterator"]
LOAD_TIMEOUT_S: Final = 60.0  # 0.3 s is usual; a loaded machine may take many times that
_MAX_PROGRAMS: Final = 32


def bpf_directory() -> Path:
    """Where bpf/ is: beside the package in a checkout, inside it in an installed wheel.

    Raises:
        LoadError: neither is there; the installation is incomplete.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "bpf", package.parent / "bpf"):
        if (candidate / "abi.h").is_file():
            return candidate
    raise LoadError("find bpf/abi.h", advice="the installation is incomplete: install it again")


def load_programs(
    source: str,
    programs: Sequence[tuple[str, ProgramKind]],
    *,
    defines: Mapping[str, str | int],
    map_fds: Sequence[int] = (),
) -> list[int]:
    """Descriptors of the named functions of `source`, loaded, in order; the caller closes them.

    `map_fds` are open in the child under the same numbers, so a `-D` may name one.

    Raises:
        LoadError: no bcc, no privilege, or the compiler or the verifier refused; says what to do.
    """
    directory = bpf_directory()
    request = {
        "kernel_source": str(directory),
        "source": str(directory / source),
        "cflags": [
            f"-I{directory}",
            # bcc's own prelude is full of warnings; ours are checked by scripts/check.
            "-Wno-everything",
            *(f"-D{name}={value}" for name, value in defines.items()),
        ],
        "programs": list(programs),
    }
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(LOAD_TIMEOUT_S)
        try:
            child = subprocess.run(
                [sys.executable, "-m", "pyforwarder.datapath._bcc", str(theirs.fileno())],
                input=json.dumps(request).encode(),
                pass_fds=(theirs.fileno(), *map_fds),
                capture_output=True,
                timeout=LOAD_TIMEOUT_S,
                check=False,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                },
            )
        except subprocess.TimeoutExpired as error:
            raise LoadError(f"load {source}: no answer within {LOAD_TIMEOUT_S:.0f} s") from error
        log = child.stderr.decode(errors="replace")
        theirs.close()
        message, descriptors, _, _ = socket.recv_fds(ours, 65536, _MAX_PROGRAMS)
    if not message:
        raise LoadError(f"load {source}: the loader ended with code {child.returncode}", log=log)
    answer = json.loads(message)
    if answer["ok"]:
        return descriptors
    raise _explained(source, answer["kind"], answer["reason"], log)


def _explained(source: str, kind: str, reason: str, log: str) -> LoadError:
    if kind == "missing":
        return LoadError(
            "bcc is not installed",
            advice="install Debian/Ubuntu: python3-bpfcc, Fedora: python3-bcc, Arch: python-bcc "
            "(PyPI's package `bcc` is another project), or use --datapath copy",
        )
    if kind == "foreign":
        return LoadError(
            f"the module bcc at {reason} is another project of that name",
            advice="pip uninstall bcc, then install your system's python3-bpfcc or python3-bcc",
        )
    if "Operation not permitted" in log or "Operation not permitted" in reason:
        return LoadError(
            f"load {source}: {reason}",
            advice="run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
            log=log,
        )
    return LoadError(f"load {source}: {reason}", log=log)
