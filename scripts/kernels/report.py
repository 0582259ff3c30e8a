"""What came of booting a guest, as a value, a line and a row of docs/datapaths.md. Pure."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from kernels import doctor
from kernels.complaints import complaints

if TYPE_CHECKING:
    from kernels.guests import Guest

BEGIN: Final = "<!-- kernels: made by scripts/kernels/run --record -->"
END: Final = "<!-- kernels: end -->"
_HEAD: Final = (
    *("Kernel", "Userland", "Lockdown", "`auto` takes"),
    *("`splice` attached by", "View", "Tests passed"),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One guest: what it is, what its doctor says, and how its tests ended."""

    guest: str
    kernel: str
    package: str
    userland: str
    python: str
    bcc: str
    doctor: dict[str, str]
    passed: int
    failed: int
    problems: tuple[str, ...]  # empty: all is as it must be
    seconds: int

    @property
    def is_good(self) -> bool:
        """Whether everything was as expected."""
        return not self.problems

    def line(self) -> str:
        """The line that ends the guest's part of a report."""
        verdict = "ok" if self.is_good else "FAILED: " + "; ".join(self.problems)
        return (
            f"kernels: {self.guest}: Linux {self.kernel or '?'}, {self.userland}: "
            f"{self.passed} passed, {self.failed} failed in {self.seconds} s: {verdict}"
        )


def judge(
    guest: Guest,
    *,
    package: str,
    facts: Mapping[str, str],
    said: Mapping[str, Any] | None,
    tests_xml: Sequence[str],
    kernel_log: str | None,
    ended: str,
    code: int | None,
    seconds: float,
) -> Outcome:
    """The outcome of a guest from what it left; what is missing is a problem.

    `tests_xml` are the results of its tests and those of the tests that were run once more.
    """
    problems: list[str] = []
    if code is None:
        problems.append(ended)
    if said is None:
        problems.append("no doctor")
    elif guest.expected is not None:
        problems += doctor.differences(guest.expected, said)
    if code is not None and kernel_log is None:
        problems.append("no log of the kernel")
    problems += complaints((kernel_log or "").splitlines())
    passed, failed = counts(*tests_xml)
    if not tests_xml:
        problems.append("no result of its tests")
    elif failed:
        problems.append(f"{failed} tests failed")
    elif code:
        problems.append(ended)
    elif not passed:
        problems.append("no test ran")
    return Outcome(
        guest.name,
        facts.get("kernel", ""),
        package,
        guest.userland(),
        facts.get("python", ""),
        facts.get("bcc", ""),
        doctor.facts(said) if said else {},
        passed,
        failed,
        tuple(problems),
        round(seconds),
    )


def counts(*tests_xml: str) -> tuple[int, int]:
    """(passed, failed) of pytest's JUnit files; an error or a skipped test did not pass.

    A test counts once, though its set-up, call and tear-down are listed apart. What a later file
    says of a test replaces what an earlier one said.
    """
    names: dict[tuple[str | None, str | None], bool] = {}
    for text in tests_xml:
        run: dict[tuple[str | None, str | None], bool] = {}
        for case in ElementTree.fromstring(text).iter("testcase"):
            key = (case.get("classname"), case.get("name"))
            bad = any(child.tag in {"failure", "error", "skipped"} for child in case)
            run[key] = run.get(key, True) and not bad
        names |= run
    failed = sum(not good for good in names.values())
    return len(names) - failed, failed


def to_json(outcomes: Sequence[Outcome]) -> str:
    """The results file."""
    return json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n"


def from_json(text: str) -> list[Outcome]:
    """What `to_json` wrote."""
    return [
        Outcome(**{**entry, "problems": tuple(entry["problems"])}) for entry in json.loads(text)
    ]


def table(outcomes: Iterable[Outcome]) -> str:
    """The table, with a line before and behind it by which it is found again."""
    rows = [_HEAD, tuple("---" for _ in _HEAD)]
    for outcome in outcomes:
        said = outcome.doctor
        total = outcome.passed + outcome.failed
        rows.append(
            (
                outcome.kernel,
                f"{outcome.userland} (Python {outcome.python}, bcc {outcome.bcc})",
                said.get("lockdown", "?"),
                said.get("auto", "?"),
                said.get("attach", "?"),
                said.get("view", "?"),
                f"{outcome.passed} of {total}",
            )
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([BEGIN, "", *lines, "", END])


def put_table(text: str, made: str) -> str:
    """`text` with the table between its two lines replaced.

    Raises:
        ValueError: `text` has not exactly one place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after:
        raise ValueError("no single place for the table of kernels")
    return before + made + after
