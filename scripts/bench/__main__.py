"""The command line: measure every target in turns, then print, save and draw the result."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
import psutil
from rich.console import Console

from bench import goals, picture, recording, report, scenarios, topology
from bench.load import LoadError, build
from bench.measures import (
    ALL_TARGETS,
    DEFAULT_TARGETS,
    MEASURES,
    PEERS,
    QUICK_TARGETS,
    SCENARIOS,
    choose,
    order_of_round,
)
from bench.results import Problem, Results, ResultsError, from_json, to_json
from bench.targets import Target, TargetError, most_pairs, most_sessions, running
from pyforwarder.runtime.children import surroundings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIN_TABLE_WIDTH: Final = 160
# A machine that does other things meanwhile measures those as well.
QUIET_PERCENT: Final = 5.0

VERSIONS: Final = {
    "haproxy": ["haproxy", "-v"],
    "nginx": ["nginx", "-v"],
    "sslh": ["sslh", "-V"],
    "socat": ["socat", "-V"],
}


def _first_line(command: list[str], *, containing: str = "") -> str:
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, **surroundings()
        )
    except OSError as error:
        return str(error)
    lines = (done.stdout + done.stderr).splitlines()
    return next((line.strip() for line in lines if containing in line), "unknown")


def describe_machine() -> dict[str, str]:
    """What a reader has to know to believe the numbers."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((x.partition(":")[2].strip() for x in cpuinfo if x.startswith("model name")), "")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kernel": f"Linux {platform.release()}",
        "cpu": f"{len(os.sched_getaffinity(0))} x {model or platform.machine()}",
        "python": platform.python_version(),
        "load_average": " ".join(f"{value:.2f}" for value in os.getloadavg()),
        **{
            name: _first_line(command, containing="version" if name == "socat" else "")
            for name, command in VERSIONS.items()
        },
    }


def _command() -> str:
    """How to run the same again; where its results go is each one's own affair."""
    words = iter(sys.argv[1:])
    kept = []
    for word in words:
        if word in ("--record", "--output"):
            next(words, None)
        elif not word.startswith(("--record=", "--output=")):
            kept.append(word)
    return shlex.join(["sudo", "scripts/bench/run", *kept])


def _raise_file_limit() -> None:
    """Take all descriptors we may have, for us and what we start."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def _stages(
    directory: Path,
    effort: scenarios.Effort,
    site_of: Callable[[str], contextlib.AbstractContextManager[topology.Site]],
    results: Results,
) -> Iterator[dict[str, scenarios.Stage]]:
    """Every target that starts, in its own place; all of them stand still unless measured."""
    with contextlib.ExitStack() as stack:
        program = build(directory)
        stages = {}
        for name in results.targets:
            own = directory / name
            own.mkdir()
            with contextlib.ExitStack() as attempt:
                site = attempt.enter_context(site_of(name))
                try:
                    target: Target = attempt.enter_context(running(name, site, own))
                except TargetError as error:
                    results.problems.append(Problem(name, f"did not start: {error}"))
                    click.echo(f"{name} did not start: {error}", err=True)
                    continue
                stages[name] = scenarios.Stage(target, site, own, program, effort)
                stack.push(attempt.pop_all())
        yield stages


def measure(stages: dict[str, scenarios.Stage], chosen: tuple[str, ...], results: Results) -> None:
    """Run each scenario for several rounds, in which the targets take turns.

    A run that breaks becomes a problem in `results`; the others go on.
    """
    for scenario in chosen:
        for round_index in range(results.rounds):
            told = []
            for name in order_of_round(tuple(stages), round_index):
                stage = stages[name]
                if not scenarios.is_possible(scenario, stage.target, stage.effort):
                    continue
                try:
                    values = scenarios.run(scenario, stage)
                except (LoadError, TargetError, scenarios.ScenarioError) as error:
                    text = f"{scenario}, round {round_index + 1}: {error}"
                    results.problems.append(Problem(name, text))
                    told.append(f"{name} FAILED: {error}")
                    continue
                for key, value in values.items():
                    results.add(key, name, round_index, value)
                first = next(m for m in MEASURES if m.key == next(iter(values)))
                told.append(f"{name} {report.number(values[first.key], first.digits)}")
            click.echo(
                f"{scenario} {round_index + 1}/{results.rounds}: {', '.join(told)}", err=True
            )


def show(results: Results, output: Path) -> None:
    """Print the tables, and write `results.json` and `results.svg` into `output`."""
    outcomes = goals.judge_all(results)
    console = Console()
    if not console.is_terminal:
        console = Console(width=MIN_TABLE_WIDTH)
    for table in (
        report.medians(results),
        report.ratios_to_best_peer(results),
        report.ratios_to_direct(results),
        report.goals(outcomes),
    ):
        console.print(table)
        console.print()
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(
        to_json(results, goals=goals.as_rows(outcomes)), encoding="utf-8"
    )
    (output / "results.svg").write_text(picture.draw(results), encoding="utf-8")
    click.echo(f"written: {output / 'results.json'}, {output / 'results.svg'}", err=True)
    for problem in results.problems:
        click.echo(f"problem: {problem.target}: {problem.text}", err=True)


def _chooser(offered: tuple[str, ...]) -> Callable[..., tuple[str, ...] | None]:
    def convert(
        _context: click.Context, _parameter: click.Parameter, value: str | None
    ) -> tuple[str, ...] | None:
        try:
            return choose(value, offered) if value is not None else None
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return convert


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: scripts/bench/run --quick --targets direct,haproxy,sockmap --scenarios rtt",
)
@click.option(
    "--targets",
    callback=_chooser(ALL_TARGETS),
    help=f"Whom to measure, of {', '.join(ALL_TARGETS)}. "
    "[default: all but sslh-select; quick: no forking ones either]",
)
@click.option(
    "--scenarios",
    "chosen",
    callback=_chooser(SCENARIOS),
    help=f"What to measure, names or beginnings of names, of {', '.join(SCENARIOS)}. "
    "[default: all]",
)
@click.option("--rounds", type=click.IntRange(1), help="How often all take turns (5; quick: 1).")
@click.option("--seconds", type=click.FloatRange(0.05), help="Length of a run (2; quick: 0.2).")
@click.option("--pairs", type=click.IntRange(1), help="Idle pairs (10,000; quick: 1,000).")
@click.option(
    "--pace",
    type=click.FloatRange(0.1),
    default=4.0,
    show_default=True,
    help="Gbit/s of the streams whose CPU time is measured.",
)
@click.option(
    "--quiet",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="What share of the machine must be free around such a stream for its number to count: "
    "less on a machine with neighbours, and then more rounds.",
)
@click.option("--quick", is_flag=True, help="Under two minutes: order of magnitude, no proof.")
@click.option(
    "--topology",
    "place",
    type=click.Choice(sorted(topology.SITES)),
    default="lo",
    show_default=True,
    help="All on one loopback, or client, forwarder and server in three namespaces.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="Directory for results.json and results.svg.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing: show a results.json of an earlier run again.",
)
@click.option(
    "--record",
    help="Put the medians into docs/benchmarks.json as the run of this name; then scripts/fix.",
)
def main(
    targets: tuple[str, ...] | None,
    chosen: tuple[str, ...] | None,
    rounds: int | None,
    seconds: float | None,
    pairs: int | None,
    pace: float,
    quiet: float,
    quick: bool,
    place: str,
    output: Path,
    source: Path | None,
    record: str | None,
) -> None:
    """Compare pyforwarder's datapaths with a direct connection and with other forwarders.

    Every target runs in network namespaces of its own and all take turns, in changing order.
    Tables go to stdout, progress to stderr. Exits with 1 if pyforwarder did not start or one of its
    runs broke; a missed goal is no error. Nothing else should run on the machine meanwhile.
    """
    if source is not None:
        try:
            results = from_json(source.read_text(encoding="utf-8"))
            show(results, output)
            if record is not None:
                recording.record(results, record, results.options.get("command", ""))
        except ResultsError as error:
            raise click.ClickException(f"{source}: {error}") from error
        return
    if os.geteuid() != 0:
        raise click.ClickException("needs root: it makes network namespaces")
    _raise_file_limit()
    busy = psutil.cpu_percent(interval=1.0)
    if busy > QUIET_PERCENT:
        click.echo(f"the machine is {busy:.0f} % busy: these numbers will mean little", err=True)
    effort = scenarios.Effort(
        seconds=seconds or (0.2 if quick else 2.0),
        # the generator holds both ends, so it is bounded as a forwarder is
        pairs=min(pairs or (1_000 if quick else 10_000), most_pairs()),
        sessions=min(1_000 if quick else 10_000, most_sessions()),
        pace_bytes_per_s=pace * 1e9 / 8,
        quiet=quiet,
    )
    results = Results(
        rounds=rounds or (1 if quick else 5),
        targets=targets or (QUICK_TARGETS if quick else DEFAULT_TARGETS),
        machine={**describe_machine(), "busy_before": f"{busy:.0f} %"},
        options={
            "command": _command(),
            "topology": place,
            "seconds": f"{effort.seconds:g}",
            "pairs": str(effort.pairs),
            "pace_gbit_per_s": f"{pace:g}",
            "quiet": f"{quiet:g}",
        },
    )
    topology.remove_leftovers()
    # A run that is told to end still stops its targets and removes its namespaces.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (
        tempfile.TemporaryDirectory(prefix="pyforwarder-bench-") as scratch,
        _stages(Path(scratch), effort, topology.SITES[place], results) as stages,
    ):
        results.machine |= {
            f"datapaths of {name}": text
            for name, stage in stages.items()
            if (text := stage.target.datapaths())
        }
        measure(stages, chosen or SCENARIOS, results)
    show(results, output)
    if record is not None:
        recording.record(results, record, results.options["command"])
    # a peer that cannot keep up is a result
    if any(problem.target not in PEERS for problem in results.problems):
        sys.exit(1)


if __name__ == "__main__":
    main()
