"""The text tables of `show`."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.datapath.ebpf.abi import LineKind
from pyforwarder.runtime import tables
from pyforwarder.supervisor.requests.report import TOTALS
from tests.helpers.fake_control import PAIR

HEADER = (
    "ID STATE DATAPATH CLIENT LISTENER SOURCE SERVER UP_BYTES DOWN_BYTES AGE_S IDLE_S RULE DECIDED"
)


def test_header_of_pairs_is_that_of_the_contract() -> None:
    assert tables.render("pairs", []) == HEADER + "\n"


def test_pair_is_one_line_with_a_field_per_column() -> None:
    lines = tables.render("pairs", [PAIR, PAIR]).splitlines()
    assert len(lines) == 3
    assert lines[1].split() == [
        "7",
        "joined",
        "sockmap",
        "127.0.0.1:40000",
        "127.0.0.1:9999",
        "127.0.0.1:40001",
        "127.0.0.1:9001",
        "1023",
        "23",
        "12",
        "0",
        "named",
        "user",
    ]


def test_columns_are_aligned() -> None:
    short = {**PAIR, "id": 1, "up_bytes": 5}
    lines = tables.render("pairs", [PAIR, short]).splitlines()
    assert len({line.index("127.0.0.1:40000") for line in lines[1:]}) == 1
    assert [line.rstrip() for line in lines] == lines


def test_what_is_not_known_is_a_dash() -> None:
    row = {**PAIR, "server": None, "rule": ""}
    fields = tables.render("pairs", [row]).splitlines()[1].split()
    assert (fields[6], fields[11]) == ("-", "-")


def test_blanks_and_terminal_sequences_are_escaped() -> None:
    assert tables.cell("unix:/a b") == "unix:/a\\040b"
    assert tables.cell("\x1b[2J") == "\\033[2J"
    assert tables.cell("a\\b") == "a\\134b"
    assert tables.cell("é") == "\\303\\251"


def test_parse_reads_what_the_kernels_file_prints() -> None:
    text = "ID STATE RULE\n3 joined   named\n\n4 draining -\n"
    assert tables.parse(text) == [
        {"id": "3", "state": "joined", "rule": "named"},
        {"id": "4", "state": "draining", "rule": "-"},
    ]


def test_parse_skips_remarks() -> None:
    assert tables.parse("# left by a daemon that is gone\nID\n3\n") == [{"id": "3"}]


def test_parse_of_nothing_is_no_rows() -> None:
    assert tables.parse("") == []


def test_numbers_of_a_parsed_pair_are_numbers() -> None:
    (row,) = tables.rows_from_text("ID UP_BYTES AGE_S RULE\n3 23 1.5 17\n")
    assert row == {"id": 3, "up_bytes": 23, "age_s": 1.5, "rule": "17"}
    (row,) = tables.rows_from_text("NAME ACCEPTED OPEN REFUSED  # gone\n80 1 2 3\n")
    assert row == {"name": "80", "accepted": 1, "open": 2, "refused": 3}


def test_stats_are_one_line_per_number() -> None:
    stats = {"accepted": 23, "closed": {"denied": 3, "finished": 17}}
    text = tables.render("stats", tables.stats_rows(stats))
    assert [line.split() for line in text.splitlines()] == [
        ["STAT", "VALUE"],
        ["accepted", "23"],
        ["closed.denied", "3"],
        ["closed.finished", "17"],
    ]


def test_stats_come_back_from_their_text() -> None:
    stats = {
        "accepted": 23,
        "joined": {"copy": 1, "sockmap": 0},
        "closed": {"denied": 3},
        "limited": {},
        "splice_invalid": {"reset": 7},
        "express": {},
        "express_left": {"no_port": 2},
        "datapaths": {"copy": "available", "splice": "no \\ tc\x1b here"},
    }
    text = tables.render("stats", tables.stats_rows(stats))
    assert tables.stats_from_text(text) == stats
    nothing: dict[str, object] = {group: {} for group in tables.MAY_HAVE_NO_LINE}
    assert tables.stats_from_text("STAT VALUE  # the daemon is gone\n") == nothing


def test_every_group_of_stats_that_may_have_no_line_is_known() -> None:
    groups: dict[str, bool] = {}
    for name, kind in ((line.name, line.kind) for line in TOTALS):
        group, dot, _ = name.partition(".")
        if dot:
            groups[group] = groups.get(group, True) and kind is LineKind.NONZERO
    assert set(tables.MAY_HAVE_NO_LINE) == {group for group, is_so in groups.items() if is_so}


def test_stats_that_are_words_keep_their_blanks() -> None:
    text = tables.render("stats", tables.stats_rows({"datapaths": {"splice": "no tc\x1b here"}}))
    assert text.splitlines()[1] == "datapaths.splice no tc\\033 here"


@given(st.lists(st.text(min_size=1).filter(lambda text: text != "-"), min_size=1))
def test_any_text_survives_a_table(rules: list[str]) -> None:
    rows = [{**PAIR, "rule": rule} for rule in rules]
    assert [row["rule"] for row in tables.parse(tables.render("pairs", rows))] == rules


@given(st.text(), st.integers(min_value=8, max_value=600))
def test_any_text_becomes_one_short_line_that_commands_no_terminal(text: str, most: int) -> None:
    line = tables.single_line(text, most=most)
    assert len(line) <= most
    assert len(line.splitlines()) <= 1
    assert all(" " <= character <= "~" for character in tables.one_line(text, most=most))


@given(st.text())
def test_line_that_was_made_of_a_text_stays_as_it_is(text: str) -> None:
    line = tables.single_line(text)
    assert tables.single_line(line) == line
    assert tables.one_line(tables.one_line(line, most=10_000), most=10_000) == tables.one_line(
        line, most=10_000
    )


@given(st.lists(st.from_regex(r"[!-~]{1,20}", fullmatch=True), min_size=1, max_size=10))
def test_words_of_every_line_are_in_the_one_line(words: list[str]) -> None:
    assert tables.single_line("\n".join(words)) == "; ".join(words)


def test_stats_with_an_error_of_many_lines_stay_one_line_each() -> None:
    text = tables.render("stats", tables.stats_rows({"datapaths": {"splice": "no:\n  R1\n  R2"}}))
    assert text.splitlines()[1:] == ["datapaths.splice no:; R1; R2"]


HOSTILE = "\x1b[2J\x9b31m\x07\x7f\r\u202e\u2066\u200b\u2028\x85\ud800"


def test_what_a_terminal_might_obey_is_escaped_in_a_whole_output() -> None:
    assert tables.visible("a\tb\nB\u00fccher \u00e9\n") == "a\tb\nB\u00fccher \u00e9\n"
    assert tables.visible(HOSTILE) == (
        "\\u001b[2J\\u009b31m\\u0007\\u007f\\u000d\\u202e\\u2066\\u200b\\u2028\\u0085\\ud800"
    )
    assert tables.visible("\U000e0001") == "\\U000e0001"


@given(st.text())
def test_json_means_the_same_when_it_is_made_visible(text: str) -> None:
    for ascii_only in (True, False):
        shown = tables.visible(json.dumps([text], ensure_ascii=ascii_only))
        if all(ord(character) <= 0xFFFF for character in text):
            assert json.loads(shown) == [text]
        assert all(c.isprintable() for c in shown)


@given(st.text())
def test_no_output_has_anything_that_commands_a_terminal(text: str) -> None:
    shown = tables.visible(text)
    assert all(character in "\t\n" or character.isprintable() for character in shown)
    assert tables.visible(shown) == shown
