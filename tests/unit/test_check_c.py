"""The check of the C files finds what it is there to find."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_c

BPF_HEAD = '#include <uapi/linux/bpf.h>\n#include "abi.h"\n#include "maps.h"\n'


def complaints(directory: Path, text: str) -> str:
    source = directory / "source.c"
    source.write_text(text)
    return check_c.complaints(source)


def test_names_that_the_loader_passes_need_no_declaration(tmp_path: Path) -> None:
    text = "void *f(__u32 *key) { return map_lookup(MAP_NEW_FD, key) + SOME_OFFSET; }\n"
    assert complaints(tmp_path, BPF_HEAD + text) == ""


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("int f(__u32 a) { int b = -1; return a < b; }", "-Wsign-compare"),
        ("int f(__u32 a) { return 0; }", "-Wunused-parameter"),
        ("static int f(void) { return 0; }", "-Wunused-function"),
        ("int f(void) { int b; return b; }", "-Wuninitialized"),
        ("#if NEVER_DEFINED\n#endif", "-Wundef"),
        ("int f(void) { return mistyped; }", "undeclared identifier 'mistyped'"),
        ("int f(void) { return f(; }", "expected expression"),
        ("int f(struct pair *pair) { return pair->nothing; }", "no member named 'nothing'"),
    ],
)
def test_a_bpf_program_with_a_fault_is_refused(tmp_path: Path, line: str, what: str) -> None:
    said = complaints(tmp_path, f"{BPF_HEAD}{line}\n")
    assert what in said
    assert f"{tmp_path}/source.c:4:" in said


def test_a_fault_in_a_header_is_found(tmp_path: Path) -> None:
    (tmp_path / "ours.h").write_text("static int f(void) { int b; return b; }\n")
    said = complaints(
        tmp_path, f'{BPF_HEAD}#include "{tmp_path}/ours.h"\nint g(void) {{ return f(); }}\n'
    )
    assert "ours.h:1:" in said
    assert "-Wuninitialized" in said


def test_a_program_of_this_host_is_checked_as_one(tmp_path: Path) -> None:
    text = '#include <stdio.h>\nint main(void)\n{\n\treturn printf("%s\\n", %s) < 0;\n}\n'
    assert complaints(tmp_path, text % ("%s", '"text"')) == ""
    assert "-Wformat" in complaints(tmp_path, text % ("%d", '"text"'))


def test_one_faulty_file_among_others_fails_them_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.c", tmp_path / "bad.c"
    good.write_text("int main(void) { return 0; }\n")
    bad.write_text("int main(void) { int unused; return 0; }\n")
    assert check_c.main([str(good)]) == 0
    assert check_c.main([str(bad), str(good)]) == 1
    assert "-Wunused-variable" in capsys.readouterr().err
