"""The screen of `top`: asks the daemon, draws, takes keys.  What keys mean is in rates.py."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from rich.console import Console, Group
from rich.live import Live
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pyforwarder.cli import rates
from pyforwarder.cli.keyboard import read_keys, single_keys
from pyforwarder.cli.processes import LocalProcesses
from pyforwarder.errors import ForwarderError
from pyforwarder.runtime import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

    from rich.console import RenderableType

    from pyforwarder.client import ControlClient, PairRow
    from pyforwarder.runtime.environment import Environment

_DONE = 0
_FAILED = 1

# ID, CLIENT, SERVER, UP/s, DOWN/s and STATE with one blank between are 79 columns: 21 is an IPv4
# address and port.  What is wider stands in the detail lines and, on a wide screen, in columns.
_WIDE = 120
_HEADING = Style(bold=True, reverse=True)
_SELECTED = Style(reverse=True)
_FIXED_LINES = 9  # totals, bytes, ends, heading, details (4), keys or message


@dataclass(slots=True)
class Snapshot:
    """Everything that one look at the daemon gave."""

    pairs: list[PairRow] = field(default_factory=list)
    rows: dict[str, list[Mapping[str, object]]] = field(default_factory=dict)
    stats: dict[str, object] = field(default_factory=dict)


@dataclass(slots=True)
class Screen:
    """What is drawn; `draw` needs nothing but what stands here."""

    instance: str
    processes: LocalProcesses
    browser: rates.Browser = field(default_factory=rates.Browser)
    snapshot: Snapshot = field(default_factory=Snapshot)
    totals_per_s: Mapping[str, float] = field(default_factory=dict)
    message: str = ""

    def draw(self, width: int, height: int) -> RenderableType:
        """The whole screen for a terminal of that size."""
        browser = self.browser
        browser.page_rows = max(height - _FIXED_LINES, 1)
        parts: list[RenderableType] = [self._totals(), self._bytes(), self._refusals()]
        if browser.mode is rates.Mode.HELP:
            parts.append(_help())
        elif browser.view is rates.View.PAIRS:
            parts += [self._pairs(width), self._details(width)]
        else:
            parts.append(self._rows(browser.view.value, browser.page_rows))
        parts.append(self._bottom())
        return Group(*parts)

    def _totals(self) -> Text:
        stats = self.snapshot.stats
        open_pairs = len(self.snapshot.pairs)
        joined = sum(row["state"] in ("joined", "half-closed") for row in self.snapshot.pairs)
        line = Text("pyforwarder ", no_wrap=True, overflow="ellipsis")
        line.append(self.instance, "bold")
        line.append(f"  pairs {open_pairs} (joined {joined})")
        line.append(f"  accepted {_number(stats, 'accepted'):,.0f}")
        line.append(f"  {self.totals_per_s.get('accepted', 0.0):,.1f}/s")
        return line

    def _bytes(self) -> Text:
        shown = self.browser.shown
        backlog = sum(row["backlog_bytes"] or 0 for row in self.snapshot.pairs)
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"up {_size(sum(rate.up_per_s for rate in shown))}/s")
        line.append(f"  down {_size(sum(rate.down_per_s for rate in shown))}/s")
        line.append(f"  backlog {_size(backlog)}")
        line.append(f"  shown {len(shown)}, by {self.browser.sort.value}")
        if self.browser.is_reversed:
            line.append(", smallest first")
        if self.browser.filter:
            line.append(f", with {self.browser.filter!r}")
        return line

    def _refusals(self) -> Text:
        closed = self.snapshot.stats.get("closed")
        counts = cast("Mapping[str, int]", closed if isinstance(closed, dict) else {})
        listed = sorted(((n, reason) for reason, n in counts.items() if n), reverse=True)
        words = ", ".join(f"{reason} {n:,}" for n, reason in listed) or "none"
        return Text(f"ended: {tables.printable(words)}", no_wrap=True, overflow="ellipsis")

    def _pairs(self, width: int) -> Table:
        is_wide = width >= _WIDE
        table = _table()
        for heading, least, right in (
            ("ID", 6, True),
            ("CLIENT", 21, False),
            ("SERVER", 21, False),
            ("UP/s", 8, True),
            ("DOWN/s", 8, True),
            ("STATE", 10, False),
        ):
            table.add_column(
                heading,
                min_width=least,
                justify="right" if right else "left",
                no_wrap=True,
                overflow="ellipsis",
            )
        if is_wide:
            for heading in ("DATAPATH", "BACKLOG", "AGE", "RULE", "PROCESSES"):
                table.add_column(heading, no_wrap=True, overflow="ellipsis")
        first = self.browser.first_row()
        for rate in self.browser.shown[first : first + self.browser.page_rows]:
            row = rate.row
            cells = [
                str(row["id"]),
                tables.cell(row["client"]),
                tables.cell(row["server"]),
                _size(rate.up_per_s),
                _size(rate.down_per_s),
                row["state"],
            ]
            if is_wide:
                cells += [
                    row["datapath"],
                    "-" if row["backlog_bytes"] is None else _size(row["backlog_bytes"]),
                    _age(row["age_s"]),
                    tables.cell(row["rule"]),
                    " > ".join(filter(None, self._processes(row))),
                ]
            table.add_row(*cells, style=_SELECTED if row["id"] == self.browser.selected else None)
        return table

    def _details(self, width: int) -> Text:
        """The selected pair in full, on four lines."""
        rate = self.browser.selected_pair()
        if rate is None:
            return Text("no pairs\n\n\n" if not self.browser.filter else "no such pairs\n\n\n")
        row = rate.row
        client, server = self._processes(row)
        accepted = (
            f"{tables.cell(row['client'])}{_in_brackets(client)} > {tables.cell(row['listener'])}"
        )
        outgoing = (
            f"{tables.cell(row['source'])} > {tables.cell(row['server'])}{_in_brackets(server)}"
        )
        state = (
            f"{row['state']}, {row['datapath']}: {tables.one_line(row['reason']) or '-'}; "
            f"rule {tables.cell(row['rule'])}"
        )
        waiting = row["backlog_bytes"]
        backlog = "unknown" if waiting is None else f"{waiting:,} B"
        counters = (
            f"up {row['up_bytes']:,} B, down {row['down_bytes']:,} B, backlog "
            f"{backlog}, age {_age(row['age_s'])}, idle {_age(row['idle_s'])}"
        )
        text = Text(no_wrap=True, overflow="ellipsis")
        lines = map(tables.printable, (accepted, outgoing, state, counters))
        text.append("\n".join(line[:width] for line in lines))
        return text

    def _processes(self, row: PairRow) -> tuple[str, str]:
        return (
            self.processes.name_of(row["client"], row["listener"]),
            self.processes.name_of(row["server"], row["source"]),
        )

    def _rows(self, what: str, limit: int) -> Table:
        table = _table()
        columns = tables.COLUMNS[what]
        for column in columns:
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        for row in self.snapshot.rows.get(what, [])[:limit]:
            table.add_row(*(_cell(column, row.get(column.lower())) for column in columns))
        return table

    def _bottom(self) -> Text:
        browser = self.browser
        match browser.mode:
            case rates.Mode.FILTER:
                return Text(f"/{browser.filter}_", "bold")
            case rates.Mode.CONFIRM:
                return Text(f"reset pair {browser.doomed}? y/n", "bold")
            case _ if self.message:
                return Text(
                    tables.printable(self.message), "bold", no_wrap=True, overflow="ellipsis"
                )
        paused = "PAUSED  " if browser.is_paused else ""
        return Text(f"{paused}q quit  s sort  / filter  x reset  tab {browser.view.value}  h help")


def run(env: Environment, control: ControlClient, *, interval_s: float) -> int:
    """Show the screen until the user quits or the terminal goes away.

    Raises:
        ForwarderError: the daemon did not answer at the start (later that is a message).
    """
    screen = Screen(control.instance.name, LocalProcesses(env.monotonic_s))
    meter, totals_meter = rates.Meter(), rates.TotalsMeter()
    look(screen, control, meter, totals_meter, now_s=env.monotonic_s())  # before the screen
    console = Console(file=env.stdout, highlight=False)
    # The terminal is put back by leaving the two contexts; a signal that ends us has to do that.
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        with (
            single_keys(env.stdin_fd),
            Live(console=console, screen=True, auto_refresh=False) as live,
        ):
            return _loop(env, control, screen, meter, totals_meter, live, interval_s=interval_s)
    except KeyboardInterrupt:  # Ctrl-C in cbreak mode is a signal: a way to quit
        return _DONE
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _loop(
    env: Environment,
    control: ControlClient,
    screen: Screen,
    meter: rates.Meter,
    totals_meter: rates.TotalsMeter,
    live: Live,
    *,
    interval_s: float,
) -> int:
    next_look_s = env.monotonic_s() + interval_s
    while True:
        size = live.console.size
        live.update(screen.draw(size.width, size.height), refresh=True)
        keys = read_keys(env.stdin_fd, timeout_s=next_look_s - env.monotonic_s())
        if keys is None:
            return _FAILED
        for key in keys:
            match screen.browser.press(key):
                case rates.Quit():
                    return _DONE
                case rates.Flush(pair_id):
                    screen.message = _flush(control, pair_id)
                    next_look_s = env.monotonic_s()  # show what came of it
        screen.browser.arrange(screen.browser.rates)
        if env.monotonic_s() >= next_look_s:
            next_look_s = env.monotonic_s() + interval_s
            if not screen.browser.is_paused:
                try:
                    look(screen, control, meter, totals_meter, now_s=env.monotonic_s())
                except ForwarderError as error:
                    screen.message = str(error)


def look(
    screen: Screen,
    control: ControlClient,
    meter: rates.Meter,
    totals_meter: rates.TotalsMeter,
    *,
    now_s: float,
) -> None:
    """Ask the daemon for everything the screen shows.

    Raises:
        ForwarderError: it did not answer; the screen stays as it was.
    """
    pairs = control.pairs()
    stats = control.stats()
    rows: dict[str, Sequence[Mapping[str, object]]] = {
        "listeners": control.listeners(),
        "rules": control.rules(),
        "upstreams": control.upstreams(),
    }
    screen.snapshot = Snapshot(
        pairs, {what: list(found) for what, found in rows.items()}, dict(stats)
    )
    screen.totals_per_s = totals_meter.update(
        {name: value for name, value in stats.items() if isinstance(value, int | float)},
        now_s=now_s,
    )
    screen.browser.arrange(meter.update(pairs, now_s=now_s))
    screen.message = ""


def _flush(control: ControlClient, pair_id: int) -> str:
    try:
        answer = control.flush([pair_id])
    except ForwarderError as error:
        return str(error)
    return f"pair {pair_id} reset" if answer["flushed"] else f"pair {pair_id} had ended"


def _cell(column: str, value: object) -> str:
    """As in the text of `show`, where reasons keep their blanks."""
    if column == "WHY" and isinstance(value, str) and value:
        return tables.one_line(value)
    return tables.cell(value)


def _table() -> Table:
    return Table(
        box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style=_HEADING, expand=False
    )


def _help() -> Table:
    table = _table()
    table.add_column("KEY")
    table.add_column("WHAT IT DOES")
    for key, words in rates.HELP:
        table.add_row(key, words)
    return table


def _in_brackets(process: str) -> str:
    return f" ({process})" if process else ""


def _number(stats: Mapping[str, object], name: str) -> float:
    value = stats.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _size(count: float) -> str:
    """Bytes in at most eight columns: `1023 B`, `1.5 KiB`, `12.3 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:  # not 1024: four digits and a point are too wide
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _age(seconds: float) -> str:
    """Seconds in at most six columns: `59s`, `59m03s`, `23h59m`, `12d03h`."""
    whole = int(seconds)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02}h"
    if hours:
        return f"{hours}h{m:02}m"
    if minutes:
        return f"{minutes}m{s:02}s"
    return f"{s}s"
