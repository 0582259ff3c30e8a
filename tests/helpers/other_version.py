"""Copies of the program as other versions have it: with records of another layout, for one."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import pyforwarder
from pyforwarder.datapath.ebpf.loading import bpf_directory


class Change(NamedTuple):
    """A text of one file, which is there once, is another one."""

    file: str
    before: str  # a regular expression
    after: str


# What is in maps, for C and for Python: all that stands behind the padding is somewhere else.
OTHER_RECORDS: Final = (
    Change("bpf/splice.h", r"(struct splice \{\n.*\n)", r"\1\t__u64 padding[8];\n"),
    Change("bpf/sessions.h", r"(struct session \{\n.*\n)", r"\1\t__u64 padding[8];\n"),
    # Its windows are whole pages.
    Change("bpf/abi.h", r"(struct pair \{(?:\n.*)*?)\n\};", r"\1\n\t__u64 padding[64];\n};"),
    Change(
        "pyforwarder/datapath/splice/abi.py",
        r"(\nclass Splice\(.*\n(?:.*\n)*?    _fields_ = \(\n.*\n)",
        r'\1        ("padding", ctypes.c_uint64 * 8),\n',
    ),
    Change(
        "pyforwarder/datapath/splice/abi.py", r"\nVERSION: Final = \d+", "\nVERSION: Final = 99"
    ),
    Change(
        "pyforwarder/datapath/splice/session_abi.py",
        r"(\nclass SessionRecord\(.*\n(?:.*\n)*?    _fields_ = \(\n.*\n)",
        r'\1        ("padding", ctypes.c_uint64 * 8),\n',
    ),
    Change(
        "pyforwarder/datapath/splice/session_abi.py",
        r"\nSESSION_VERSION: Final = \d+",
        "\nSESSION_VERSION: Final = 99",
    ),
    Change(
        "pyforwarder/datapath/ebpf/abi.py",
        r"(\nclass PairRecord\(.*\n(?:.*\n)*?    _fields_ = \(\n(?:        .*\n)*)",
        r'\1        ("padding", ctypes.c_uint64 * 64),\n',
    ),
    Change(
        "pyforwarder/datapath/ebpf/abi.py",
        r"\nABI_VERSION: Final = \d+",
        "\nABI_VERSION: Final = 99",
    ),
)
# As one that knows nothing of spliced pairs that stay.
CANNOT_KEEP: Final = (
    Change("pyforwarder/supervisor/takeover/retirement.py", r'\n *"keeps_spliced": True,', ""),
)


def other_version(directory: Path, changes: Iterable[Change]) -> tuple[str, ...]:
    """Make a copy in a directory that is not there yet; the words that run it."""
    package = Path(pyforwarder.__file__).parent
    # With what Python has compiled of the files that stay as they are: 0.3 s of a processor. Not
    # what another process is writing.
    shutil.copytree(package, directory / "pyforwarder", ignore=shutil.ignore_patterns("*.pyc.*"))
    shutil.copytree(bpf_directory(), directory / "bpf")
    # Workers, which run as nobody, read it.
    for path in (directory, *directory.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    for file, before, after in changes:
        path = directory / file
        text, count = re.subn(before, after, path.read_text())
        assert count == 1, f"{file} has {before!r} {count} times"
        path.write_text(text)
    run = (
        f"import sys; sys.path.insert(0, {str(directory)!r}); "
        "from pyforwarder.cli import main; sys.exit(main())"
    )
    return sys.executable, "-P", "-c", run
