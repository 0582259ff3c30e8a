"""Commands that try things out: doctor, demo."""

from __future__ import annotations

import json

import click

from pyforwarder.cli.command import DONE, FAILED, Call, command
from pyforwarder.errors import ForwarderError


@command(example="sudo pyforwarder doctor")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def doctor(call: Call, as_json: bool) -> int:
    """Tell what this kernel can do, proven by moving real bytes.

    Fails if not even one datapath works.
    """
    from pyforwarder.cli import doctor as examination

    try:
        stats = call.control().stats()
    except ForwarderError:
        stats = None  # there is none, or it is not ours to ask
    report = examination.run(stats)
    call.write(json.dumps(report.as_json(), indent=2) + "\n" if as_json else report.as_text())
    if call.verbosity and (logs := report.logs()):
        call.say(logs.rstrip())
    return DONE if report.is_usable else FAILED


@command(example="sudo pyforwarder demo")
def demo(call: Call) -> int:
    """Run server, client and forwarder in one go; print the pairs.

    Moves real data through every datapath that works here, prints the rates beside that of a
    direct connection, and leaves nothing behind.
    """
    from pyforwarder.cli import demo as demonstration

    return demonstration.run(call.env)
