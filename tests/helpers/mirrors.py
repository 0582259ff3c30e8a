"""Headers of bpf/ and their mirrors in Python: what the C compiler says, and what Python has."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from pyforwarder.datapath.ebpf.loading import bpf_directory


def without_comments(header: str) -> str:
    """The text of that header."""
    text = (bpf_directory() / header).read_text()
    return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)


def structures_of(header: str) -> set[str]:
    """The names of the structures that it declares."""
    return set(re.findall(r"^struct (\w+) \{", without_comments(header), re.MULTILINE))


def fields(structure: type[ctypes.Structure]) -> list[str]:
    """Their names in Python, in order; a `_` at the end keeps one from being a keyword."""
    return [entry[0] for entry in structure._fields_]


def size_of(name: str) -> str:
    """C's expression for the size of a structure."""
    return f"sizeof(struct {name})"


def offset_of(name: str, field: str) -> str:
    """C's expression for where a field begins."""
    return f"offsetof(struct {name}, {field.rstrip('_')})"


def size_of_field(name: str, field: str) -> str:
    """C's expression for the size of a field."""
    return f"sizeof(((struct {name} *)0)->{field.rstrip('_')})"


def layout(structures: Mapping[str, type[ctypes.Structure]]) -> dict[str, int]:
    """The values of C's expressions as the mirrors have them, by C's names of the structures."""
    values = {}
    for name, structure in structures.items():
        values[size_of(name)] = ctypes.sizeof(structure)
        for field in fields(structure):
            values[offset_of(name, field)] = getattr(structure, field).offset
            values[size_of_field(name, field)] = getattr(structure, field).size
    return values


def compiled(header: str, expressions: Iterable[str], directory: Path) -> dict[str, int]:
    """The values of integer expressions as the compiler has them; `directory` takes its files."""
    expressions = list(expressions)
    prints = "\n".join(f'printf("%lld\\n", (long long)({one}));' for one in expressions)
    source, program = directory / "values.c", directory / "values"
    source.write_text(
        "#include <linux/types.h>\n#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{header}"\nint main(void) {{\n{prints}\nreturn 0;\n}}\n'
    )
    subprocess.run(
        ["cc", "-Wall", "-Werror", f"-I{bpf_directory()}", "-o", program, source], check=True
    )
    lines = subprocess.run([program], capture_output=True, check=True).stdout.split()
    return dict(zip(expressions, map(int, lines), strict=True))
