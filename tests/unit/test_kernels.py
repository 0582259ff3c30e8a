"""The kernel matrix: what is expected of a guest, how it is judged, and the table of it."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from kernels import doctor, guests, images, machine, report
from kernels.complaints import complaints
from kernels.doctor import Expected

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "kernels" / "results.json"


def said(**changed: str) -> dict[str, Any]:
    """A doctor's report of a host where all is well, but for what is changed."""
    details = {
        "lockdown": "none: nothing is refused for it",
        "attach": "tcx: programs on interfaces are links, which end with us",
        "view": "printed by the kernel, by map iterators",
        **changed,
    }
    return {
        "findings": [{"name": n, "good": None, "detail": text} for n, text in details.items()],
        "datapaths": {n: {"works": True, "reason": ""} for n in ("splice", "sockmap", "copy")},
        "auto": "splice",
    }


def xml(**verdicts: str) -> str:
    """pytest's results: a name of a test and the element that tells of its fault, or nothing."""
    cases = "".join(
        f'<testcase classname="m" name="{name}">{f"<{tag}/>" if tag else ""}</testcase>'
        for name, tag in verdicts.items()
    )
    return f"<testsuites><testsuite>{cases}</testsuite></testsuites>"


def judged(**changed: Any) -> report.Outcome:
    values: dict[str, Any] = {
        "package": "linux-image-x=1",
        "facts": {"kernel": "6.12.1", "python": "3.13.5", "bcc": "0.31.0"},
        "said": said(),
        "tests_xml": [xml(a="", b="")],
        "kernel_log": "[    0.1] Linux version 6.12.1\n",
        "ended": "the job ended with 0",
        "code": 0,
        "seconds": 61.4,
        **changed,
    }
    return report.judge(guests.named("6.12"), **values)


def test_a_guest_that_is_as_expected_is_good() -> None:
    outcome = judged()
    assert outcome.is_good
    assert (outcome.passed, outcome.failed) == (2, 0)
    assert outcome.line() == (
        "kernels: 6.12: Linux 6.12.1, Debian 13: 2 passed, 0 failed in 61 s: ok"
    )


@pytest.mark.parametrize(
    ("name", "detail", "found"),
    [
        ("lockdown", "integrity: as with Secure Boot", "integrity"),
        ("attach", "clsact: no tcx before Linux 6.6", "clsact"),
        ("view", "printed by the kernel, by the ksym iterator (why)", "ksym iterator"),
        ("view", "the daemon writes the files", "none: the daemon writes the files"),
    ],
)
def test_what_doctor_says_otherwise_is_told(name: str, detail: str, found: str) -> None:
    (line,) = doctor.differences(Expected(), said(**{name: detail}))
    assert line.startswith(f"{name}: expected ")
    assert line.endswith(f", doctor says {found}")


def test_a_datapath_that_does_not_work_is_told_with_its_reason() -> None:
    report_of_doctor = said()
    report_of_doctor["datapaths"]["sockmap"] = {"works": False, "reason": "refused"}
    report_of_doctor["auto"] = None
    assert doctor.differences(Expected(), report_of_doctor) == [
        "sockmap: expected works, doctor says broken: refused",
        "auto: expected splice, doctor says none",
    ]


def test_a_line_that_doctor_does_not_say_is_a_difference() -> None:
    report_of_doctor = said()
    report_of_doctor["findings"] = []
    lines = doctor.differences(Expected(), report_of_doctor)
    assert [line.partition(":")[0] for line in lines] == ["attach", "view", "lockdown"]
    assert all(line.endswith("doctor says nothing") for line in lines)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"tests_xml": [xml(a="failure", b="")]}, "1 tests failed"),
        ({"tests_xml": [xml(a="error", b="skipped")]}, "2 tests failed"),
        ({"tests_xml": []}, "no result of its tests"),
        ({"tests_xml": [xml()]}, "no test ran"),
        ({"code": 3, "ended": "the job ended with 3"}, "the job ended with 3"),
        ({"code": None, "ended": "not done after 9 s"}, "not done after 9 s"),
        ({"said": None}, "no doctor"),
        ({"kernel_log": None}, "no log of the kernel"),
        (
            {"kernel_log": "[ 9.1] BUG: kernel NULL pointer dereference, address: 0\n"},
            "[ 9.1] BUG: kernel NULL pointer dereference, address: 0",
        ),
        ({"said": said(lockdown="integrity: x")}, "lockdown: expected none, doctor says integrity"),
    ],
)
def test_what_is_wrong_or_missing_is_a_problem(changed: dict[str, Any], problem: str) -> None:
    outcome = judged(**changed)
    assert outcome.problems == (problem,)
    assert outcome.line().endswith(f"FAILED: {problem}")


@pytest.mark.parametrize(
    ("line", "is_one"),
    [
        ("[ 7.1] WARNING: CPU: 0 PID: 61 at net/core/skmsg.c:900 sk_psock_drop+0x1/0x2", True),
        ("[ 7.1] WARNING: net/core/skmsg.c:900 at sk_psock_drop+0x1/0x2, CPU#1: x/2513", True),
        ("WARNING: CPU: 0 PID: 61 at kernel/bpf/verifier.c:1 x+0x1/0x2", True),
        ("[ 7.1] kernel BUG at net/core/skbuff.c:2200!", True),
        ("[ 7.1] BUG: KASAN: slab-use-after-free in x", True),
        ("[ 7.1] Oops: 0002 [#1] PREEMPT SMP", True),
        ("[ 7.1] refcount_t: underflow; use-after-free.", True),
        ("[ 0.2] Speculative Return Stack Overflow: WARNING: See https://kernel.org/doc", False),
        ("[ 0.2] DEBUG: nothing", False),
        # The race that bpf/README.md tells of.
        (
            "[ 7.1] WARNING: CPU: 0 PID: 2 at net/ipv4/af_inet.c:157 inet_sock_destruct+0x1/0x2",
            False,
        ),
        ("[ 7.1] WARNING: net/ipv4/af_inet.c:159 at inet_sock_destruct+0x1/0x2, CPU#1: k/2", False),
    ],
)
def test_a_complaint_of_the_kernel_is_told_from_advice(line: str, is_one: bool) -> None:
    assert complaints(["[ 0.0] Linux version", line]) == ([line] if is_one else [])


def test_a_test_that_passes_the_second_time_has_passed() -> None:
    first, again = xml(a="failure", b="", c="failure"), xml(a="", c="failure")
    assert report.counts(first, again) == (2, 1)


def test_a_test_counts_once_though_its_phases_are_listed_apart() -> None:
    twice = xml(a="failure").replace(
        "</testsuite>", '<testcase classname="m" name="a"/></testsuite>'
    )
    assert report.counts(twice) == (0, 1)


def test_every_guest_that_ci_boots_is_expected_to_do_something() -> None:
    assert [guest.name for guest in guests.ALL] == ["6.1", "6.12", "backports", "lockdown"]
    assert all(guest.expected for guest in guests.ALL)


def test_the_tests_of_a_guest_exist() -> None:
    for guest in guests.ALL:
        for name in (*guest.tests, *guest.left_out):
            path, has_one, function = name.partition("::")
            text = (ROOT / path).read_text()
            assert not has_one or f"def {function.partition('[')[0]}(" in text


def test_any_kernel_of_a_release_can_be_named() -> None:
    guest = guests.named("bookworm-backports/linux-image-amd64=6.12.9-1")
    assert (guest.suite, guest.release) == ("bookworm", "bookworm-backports")
    assert guest.package == "linux-image-amd64=6.12.9-1"
    assert guest.expected is None


@pytest.mark.parametrize("name", ["6.5", "jammy/linux-image-amd64", "trixie/", "/x", ""])
def test_what_is_no_guest_is_refused_with_the_names_that_are(name: str) -> None:
    with pytest.raises(guests.UnknownGuestError, match="backports, lockdown"):
        guests.named(name)


def test_results_are_written_and_read() -> None:
    outcomes = [judged(), judged(said=None)]
    assert report.from_json(report.to_json(outcomes)) == outcomes


def test_a_table_replaces_the_one_before_it() -> None:
    text = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    made = report.table([judged()])
    assert report.put_table(text, made) == f"a\n{made}\nb\n"
    assert "| 6.12.1 | Debian 13 (Python 3.13.5, bcc 0.31.0) | none | splice | tcx |" in made
    with pytest.raises(ValueError, match="no single place"):
        report.put_table("nothing", made)


def test_the_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    for age_s, name in enumerate(["new", "old", "older", "oldest"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1000 - age_s, 1000 - age_s))
    (tmp_path / ".making-x").mkdir()  # left by one that was killed
    images.keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old"]


def test_an_image_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "roots" / "x"

    def fail() -> None:
        with images.appearing(path) as work:
            (work / "x").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(path.parent.iterdir()) == []
    with images.appearing(path) as work:
        (work / "x").write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_the_key_of_an_image_tells_its_parts_apart() -> None:
    assert images.key_of(b"ab", b"c") != images.key_of(b"a", b"bc")
    assert images.key_of(b"ab", b"c") == images.key_of(b"ab", b"c")


def test_what_a_root_is_made_from_exists() -> None:
    for name in images._ROOT_SOURCES:
        assert (ROOT / name).is_file()


def test_results_are_json_that_people_can_compare() -> None:
    assert isinstance(json.loads(report.to_json([judged()])), list)


def test_a_guest_gets_the_checkout_and_its_job(tmp_path: Path) -> None:
    path = tmp_path / "given.tar"
    machine.pack("echo hello\n", path)
    assert path.stat().st_size % 512 == 0
    with tarfile.open(path) as archive:
        job = archive.extractfile("job")
        assert job is not None
        assert job.read() == b"echo hello\n"
        names = set(archive.getnames())
    assert {"src/pyproject.toml", "src/scripts/kernels/guest/job"} <= names
    assert not [name for name in names if ".venv" in name or "__pycache__" in name]


def test_what_a_guest_leaves_is_laid_out(tmp_path: Path) -> None:
    left, out = tmp_path / "left.tar", tmp_path / "out"
    (tmp_path / "status").write_text("0\n")
    with tarfile.open(left, "w") as archive:
        archive.add(tmp_path / "status", "./status")
    os.truncate(left, 1 << 20)  # it is written to a disk, which is longer
    assert machine.unpack(left, out)
    assert (out / "status").read_text() == "0\n"


def test_a_guest_that_left_nothing_is_told_apart(tmp_path: Path) -> None:
    left = tmp_path / "left.tar"
    left.write_bytes(bytes(1 << 20))
    assert not machine.unpack(left, tmp_path / "out")


def test_the_table_in_the_documents_is_that_of_the_last_recorded_results() -> None:
    page = (ROOT / "docs" / "datapaths.md").read_text()
    if not RESULTS.exists():  # nothing was recorded yet: then nothing may be claimed
        assert f"{report.BEGIN}\n{report.END}\n" in page
        return
    outcomes = report.from_json(RESULTS.read_text())
    assert [outcome.guest for outcome in outcomes] == [guest.name for guest in guests.ALL]
    assert all(outcome.is_good and outcome.failed == 0 for outcome in outcomes)
    assert report.put_table(page, report.table(outcomes)) == page
