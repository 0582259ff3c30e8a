"""Where the BPF sources are: `bpf/` beside the package in a checkout, inside it in a wheel.

Only paths live here; compiling is `_bcc.py`'s, so that `pyforwarder --help` needs no bcc.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from pyforwarder.errors import LoadError

_PACKAGE = "pyforwarder"
_MARK = "abi.h"  # every layout of bpf/ has it


def bpf_directory() -> Path:
    """The directory with `abi.h`, the programs and the header tree.

    It is also what BCC_KERNEL_SOURCE must name: bcc changes into it and finds `include/` and
    `arch/` there, in place of a kernel source tree.

    Raises:
        LoadError: neither place has the sources; the installation is damaged.
    """
    # A real path is needed (bcc opens the files itself), so a zipped package is not supported.
    package = Path(str(resources.files(_PACKAGE)))
    candidates = (package / "bpf", package.parent / "bpf")
    for candidate in candidates:
        if (candidate / _MARK).is_file():
            return candidate
    looked = ", ".join(str(candidate) for candidate in candidates)
    raise LoadError(
        f"find the BPF sources: no {_MARK} in {looked}",
        advice="install pyforwarder again: its wheel carries them",
    )


def bpf_source(name: str) -> Path:
    """The path of one file of `bpf/`, such as `redirect.c`.

    Raises:
        LoadError: there is no such file; the installation is damaged.
    """
    path = bpf_directory() / name
    if not path.is_file():
        raise LoadError(
            f"find the BPF source {name}: not in {path.parent}",
            advice="install pyforwarder again: its wheel carries it",
        )
    return path
