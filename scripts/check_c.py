"""Compile C files with warnings, and fail on any of them.

BPF programs are compiled as they are for a load (by pyforwarder.datapath.ebpf._bcc), for what they
run on: that takes no privilege. What they leave to the loader (offsets, descriptors,
sizes: names in capitals that no header declares) gets a number here, whichever names these are. One
that the loader does not pass fails where it is loaded, so in the kernel tests. Other files are for
this host.

Run by scripts/check, with the files as arguments.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Final, NamedTuple

from pyforwarder.runtime import children

BPF: Final = Path(__file__).resolve().parent.parent / "bpf"
WARNINGS: Final = ("-Wall", "-Wextra", "-Wundef")
# As good as any: aligned like an offset, not so large that a structure is left behind, not 0.
NUMBER: Final = 64

_UNDECLARED: Final = re.compile(r"error: use of undeclared identifier '([A-Z][A-Z0-9_]*)'")
_DIAGNOSTIC: Final = re.compile(r"^(\S+?):\d+:\d+: (?:warning|error|fatal error): ", re.MULTILINE)
# bcc hands the source to its compiler under the first name, and its own headers under the second.
_SOURCE, _BCC_HEADERS = "/virtual/main.c", "/virtual/"


class Compiled(NamedTuple):
    """How a compilation ended."""

    succeeded: bool
    said: str


def is_bpf(source: Path) -> bool:
    """Whether it is for the kernel, not for this host."""
    return "#include <uapi/linux/bpf.h>" in source.read_text()


def complaints(source: Path) -> str:
    """What the compiler says that somebody must do something about; empty if nothing."""
    return _complaints_bpf(source) if is_bpf(source) else _complaints_host(source)


def _complaints_bpf(source: Path) -> str:
    bare = _compile_bpf(source, ["-Wno-everything"])
    names = sorted(set(_UNDECLARED.findall(bare.said)))
    done = _compile_bpf(source, [*WARNINGS, *(f"-D{name}={NUMBER}" for name in names)])
    said = done.said.replace(_SOURCE, str(source))
    ours = [path for path in _DIAGNOSTIC.findall(said) if not path.startswith(_BCC_HEADERS)]
    if done.succeeded and not ours:
        return ""
    return said or f"{source}: the compiler said nothing, and failed\n"


def _compile_bpf(source: Path, flags: list[str]) -> Compiled:
    """Compile with bcc, as loading.py has it done."""
    request = {
        "kernel_source": str(BPF),
        "source": str(source),
        "cflags": [f"-I{BPF}", "-ferror-limit=0", *flags],
        "functions": [],
    }
    child = children.run(
        children.python("pyforwarder.datapath.ebpf._bcc"), input=json.dumps(request).encode()
    )
    said = child.stderr.decode(errors="replace")
    if not child.stdout:
        return Compiled(False, f"{said}{source}: bcc ended with code {child.returncode}\n")
    result = json.loads(child.stdout)
    if not result["ok"]:
        said += f"{source}: {result['reason']}\n"
    return Compiled(result["ok"], said)


def _complaints_host(source: Path) -> str:
    done = children.run(
        ["clang", "-std=gnu11", "-O2", *WARNINGS, "-Werror", "-fsyntax-only", str(source)]
    )
    said = done.stderr.decode(errors="replace")
    return said or ("" if done.returncode == 0 else f"{source}: clang failed\n")


def main(arguments: list[str]) -> int:
    """0 if no file has a warning."""
    found = [text for argument in arguments if (text := complaints(Path(argument).absolute()))]
    for text in found:
        print(text, file=sys.stderr, end="")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
