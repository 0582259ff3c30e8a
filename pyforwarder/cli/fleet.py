"""Commands about a fleet: what its machines share, how they fare, servers that register."""

from __future__ import annotations

import contextlib
import difflib
import json
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from pyforwarder.cli.command import DONE, FAILED, Call, command, group
from pyforwarder.core.datapaths import OUTLIVING
from pyforwarder.core.wording import counted
from pyforwarder.errors import ConfigError, ForwarderError, UsageError
from pyforwarder.runtime import tables
from pyforwarder.runtime.slowness import scaled_s

if TYPE_CHECKING:
    from pyforwarder.config import Fleet
    from pyforwarder.fleet.layout import Edition, Keys
    from pyforwarder.fleet.store import Store

# How long others may take: to say whose an address is, to take the addresses, to go on with pairs.
_PROBE_S = 1.0
_ANSWER_S = 10.0
_MOVED_S = 10.0
_LOOK_S = 0.1
_TURNS = 10  # when others change the same key at the same time

_config = click.option(
    "-c",
    "--config",
    "config_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    required=True,
    help="A machine's configuration, with `fleet`.",
)
_comment = click.option("--comment", metavar="TEXT", default="", help="Why, for the history.")


class _Opened:
    """A fleet's store, for one command."""

    def __init__(self, config_path: Path) -> None:
        from pyforwarder.config import load_whole, validated

        loaded = load_whole(config_path)
        self.text, self.document = loaded.text, loaded.document
        config = validated(loaded.document, source=str(config_path))
        if config.fleet is None:
            raise ConfigError("no fleet is named here", path="fleet", source=str(config_path))
        self.fleet: Fleet = config.fleet
        from pyforwarder.fleet.layout import Keys
        from pyforwarder.fleet.opening import open_store

        self.keys: Keys = Keys(config.fleet.name)
        self.store: Store = open_store(config.fleet)

    def current(self) -> tuple[Edition | None, int]:
        """The edition that is to be in force, and the revision of the key that has it."""
        from pyforwarder.fleet.layout import Edition, ValueFault

        found = self.store.get(self.keys.config)
        if found is None:
            return None, 0
        try:
            return Edition.decode(found[0]), found[1]
        except ValueFault as error:
            raise ForwarderError(f"{self.keys.config}: {error}") from error

    def why_not_taken(self, upstream: str, address: str) -> str:
        """Why a machine with this configuration takes no such server; empty: it does, or the
        store does not say.
        """
        from pyforwarder.config import parse_config
        from pyforwarder.config.merging import merged_text
        from pyforwarder.config.upstream import why_not_taken

        with contextlib.suppress(ForwarderError):
            edition, _ = self.current()
            where = f"edition {edition.serial}" if edition else "no edition yet"
            shared = edition.text if edition else ""
            text = merged_text(self.text, shared, {}, own_source="own", shared_source=where)
            upstreams = parse_config(text, source=where).upstreams
            if why := why_not_taken(upstreams, upstream, address):
                return f"{why} ({where})"
        return ""

    def edition(self, serial: int | None) -> Edition:
        """One of the history; None: the current one."""
        from pyforwarder.fleet.layout import Edition, ValueFault

        if serial is None:
            current, _ = self.current()
            if current is None:
                raise ForwarderError(f"the fleet {self.fleet.name!r} has no configuration yet")
            return current
        found = self.store.get(self.keys.edition(serial))
        if found is None:
            raise ForwarderError(f"there is no edition {serial}: see `pyforwarder fleet history`")
        try:
            return Edition.decode(found[0])
        except ValueFault as error:
            raise ForwarderError(f"edition {serial}: {error}") from error

    def put(self, text: str, *, comment: str, now: float) -> Edition:
        """A new edition with this text; machines take it at once."""
        from pyforwarder.fleet.layout import HISTORY_LENGTH, Edition

        for _ in range(_TURNS):
            current, revision = self.current()
            serial = (current.serial if current else 0) + 1
            edition = Edition(
                serial=serial,
                text=text,
                by=_who(),
                at=datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
                comment=comment,
            )
            also: list[tuple[str, str | None]] = [(self.keys.edition(serial), edition.encode())]
            if serial > HISTORY_LENGTH:
                also.append((self.keys.edition(serial - HISTORY_LENGTH), None))
            if self.store.change(self.keys.config, edition.encode(), was=revision, also=also):
                return edition
        raise ForwarderError("others change the configuration all the time: try again")


@contextlib.contextmanager
def _opened(config_path: Path) -> Iterator[_Opened]:
    opened = _Opened(config_path)
    try:
        yield opened
    finally:
        opened.store.close()


def _who() -> str:
    import getpass
    import socket

    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        user = "?"
    return f"{user}@{socket.gethostname()}"


@group(
    name="fleet",
    example="pyforwarder fleet put -c /etc/fleet.yaml shared.yaml\n"
    "pyforwarder fleet instances -c /etc/fleet.yaml",
)
def fleet() -> None:
    """See and change what the machines of a fleet share.

    Listeners and upstreams in the fleet's store are in force on each of its machines, beside those
    in its own file.
    """


@command(
    name="put",
    example="pyforwarder fleet put -c /etc/fleet.yaml shared.yaml --comment v2",
)
@click.argument("file", type=click.Path(path_type=Path))
@_config
@_comment
def put(call: Call, file: Path, config_path: Path, comment: str) -> int:
    """Put a configuration in force on all machines.

    It is checked first, as one of a machine with the configuration of --config. A machine that
    cannot use it keeps what it has: see `pyforwarder fleet instances`. Prints the serial number,
    and warnings as `check` does.
    """
    from pyforwarder.config import parse_config, read_config_text
    from pyforwarder.config.merging import check_shared, merged_document, merged_text
    from pyforwarder.config.warnings import config_warnings

    with _opened(config_path) as opened:
        text = read_config_text(file)
        check_shared(text, opened.text, source=str(file))
        own, shared = str(config_path), str(file)
        whole = merged_text(opened.text, text, {}, own_source=own, shared_source=shared)
        document = merged_document(opened.document, text, shared_source=shared)
        for warning in config_warnings(parse_config(whole, source=own), document, source=own):
            call.say(f"warning: {warning}")
        edition = opened.put(text, comment=comment, now=call.env.unix_time_s())
    call.write(f"{edition.serial}\n")
    return DONE


@command(name="get", example="pyforwarder fleet get -c /etc/fleet.yaml --serial 7")
@_config
@click.option("--serial", type=click.IntRange(min=1), help="An earlier edition.")
def get(call: Call, config_path: Path, serial: int | None) -> int:
    """Print the configuration that the machines share."""
    with _opened(config_path) as opened:
        text = opened.edition(serial).text
    call.write(text if text.endswith("\n") or not text else f"{text}\n")
    return DONE


@command(name="diff", example="pyforwarder fleet diff -c /etc/fleet.yaml shared.yaml")
@click.argument("file", type=click.Path(path_type=Path), required=False)
@_config
@click.option("--serial", type=click.IntRange(min=1), help="An earlier edition.")
def diff(call: Call, file: Path | None, config_path: Path, serial: int | None) -> int:
    """Compare the configuration that the machines share with a file, or with an earlier edition.

    Exits with 1 if they differ.
    """
    if (file is None) == (serial is None):
        raise UsageError("fleet diff: say either a FILE or --serial, to compare with")
    from pyforwarder.config import read_config_text

    with _opened(config_path) as opened:
        current = opened.edition(None)
        here = f"edition {current.serial}"
        if file is not None:
            before, after = (current.text, here), (read_config_text(file), str(file))
        else:
            earlier = opened.edition(serial)
            before, after = (earlier.text, f"edition {earlier.serial}"), (current.text, here)
    lines = list(
        difflib.unified_diff(
            before[0].splitlines(), after[0].splitlines(), before[1], after[1], lineterm=""
        )
    )
    call.write("".join(f"{line}\n" for line in lines))
    return FAILED if lines else DONE


@command(name="history", example="pyforwarder fleet history -c /etc/fleet.yaml")
@_config
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def history(call: Call, config_path: Path, as_json: bool) -> int:
    """List the editions, the newest first: when, by whom, and why."""
    from pyforwarder.fleet.layout import newest_first

    with _opened(config_path) as opened:
        editions = newest_first(opened.store.list(opened.keys.history).entries)
    rows = [
        {name: getattr(edition, name) for name in ("serial", "at", "by", "comment")}
        for edition in editions
    ]
    _show(call, rows, ("serial", "at", "by", "comment"), as_json)
    return DONE


@command(name="rollback", example="pyforwarder fleet rollback -c /etc/fleet.yaml 7")
@click.argument("serial", type=click.IntRange(min=1))
@_config
@_comment
def rollback(call: Call, serial: int, config_path: Path, comment: str) -> int:
    """Put an earlier edition in force again, as a new one.  Prints its serial number."""
    with _opened(config_path) as opened:
        text = opened.edition(serial).text
        edition = opened.put(
            text, comment=comment or f"rollback to {serial}", now=call.env.unix_time_s()
        )
    call.write(f"{edition.serial}\n")
    return DONE


@command(name="instances", example="pyforwarder fleet instances -c /etc/fleet.yaml")
@_config
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def instances(call: Call, config_path: Path, as_json: bool) -> int:
    """List the machines: version, edition in force, and what one refused and why.

    Fails if one of them has refused the newest edition, or two have the same name.
    """
    from pyforwarder.fleet.layout import InstanceReport, ValueFault

    rows: list[dict[str, Any]] = []
    with _opened(config_path) as opened:
        prefix = opened.keys.instances
        for key, value in opened.store.list(prefix).entries:
            try:
                report = InstanceReport.decode(value)
            except ValueFault as error:
                call.say(f"pyforwarder: {key}: {error}")
                continue
            rows.append(
                {
                    "instance": key.removeprefix(prefix),
                    **report.model_dump(exclude={"schema_", "writer"}),
                    "why": report.complaint,
                }
            )
    _show(
        call, rows, ("instance", "version", "serial", "refused", "started", "pid", "why"), as_json
    )
    return FAILED if any(row["refused"] or row["is_shared"] for row in rows) else DONE


@command(name="clients", example="pyforwarder fleet clients -c /etc/fleet.yaml")
@_config
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def clients(call: Call, config_path: Path, as_json: bool) -> int:
    """List the clients that have most, as machines tell each other for `fleet: {limits: ...}`.

    What they have of all listeners by PROTOCOL, and at each LISTENER.  What a client has at a
    machine is not told there as long as it is no more than its share.
    """
    from pyforwarder.fleet.layout import ValueFault
    from pyforwarder.fleet.limits import LimitsReport, read_report, rows_of

    reports: dict[str, LimitsReport] = {}
    with _opened(config_path) as opened:
        prefix = opened.keys.limits
        for key, value in opened.store.list(prefix).entries:
            machine = key.removeprefix(prefix)
            try:
                reports[machine] = read_report(machine, value)
            except ValueFault as error:
                call.say(f"pyforwarder: {key}: {error}")
    rows = rows_of(reports)
    if not as_json:
        for row in rows:
            row["machines"] = ",".join(f"{name}={count}" for name, count in row["machines"].items())
    _show(call, rows, ("client", "total", "protocol", "listener", "machines"), as_json)
    return DONE


@command(
    name="register",
    example="pyforwarder register -c /etc/fleet.yaml web 10.0.0.7:443 --ttl 10s",
)
@click.argument("upstream")
@click.argument("address")
@_config
@click.option("--ttl", default="10s", metavar="TIME", show_default=True, help="Gone so long after.")
@click.option("--weight", type=click.IntRange(0, 256), default=1, help="0: no new pairs.")
def register(
    call: Call, upstream: str, address: str, config_path: Path, ttl: str, weight: int
) -> int:
    """Register a server of a fleet's upstream while this runs.

    The upstream says from where it takes servers (`registered: [10.0.0.0/8]`).  SIGTERM and Ctrl-C
    end it and take the server out.
    """
    from pyforwarder.config.values import parse_duration, parse_upstream_name
    from pyforwarder.core.address import Address, AddressError, parse_destination

    try:
        name = parse_upstream_name(upstream)
        ttl_s = parse_duration(ttl)
        parsed = parse_destination(address)
    except (ValueError, AddressError) as error:
        raise UsageError(f"register: {error}") from error
    if not isinstance(parsed, Address):
        raise UsageError("register: a server registers an IP address, not a name")
    if not 1 <= ttl_s <= 86400:
        raise UsageError("register: --ttl is 1s to 1d")
    from pyforwarder.fleet.layout import Server
    from pyforwarder.fleet.registration import Registration

    with _opened(config_path) as opened:

        def warn() -> None:
            if why := opened.why_not_taken(name, str(parsed)):
                call.say(f"pyforwarder: warning: machines do not take this server: {why}")

        registration = Registration(
            opened.store,
            opened.keys.server(name, parsed),
            Server(weight=weight).encode(),
            ttl_s=int(ttl_s),
            say=lambda words: call.say(f"pyforwarder: {words}"),
            registered=warn,
        )

        def end(_number: int, _frame: FrameType | None) -> None:
            registration.end()

        before: dict[int, Any] = {
            number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            registration.run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return DONE


@command(name="ready", example="pyforwarder fleet ready")
def ready(call: Call) -> int:
    """Say whether this machine may get the addresses that move: for a VRRP daemon's script.

    It may once its daemon splices and has read what is in the fleet's store.  Exits with 1 if not.
    """
    state = call.control().failover()
    here = state["here"]
    assert isinstance(here, list)
    call.write(
        f"ready={'no' if state['why'] else 'yes'} here={','.join(map(str, here)) or '-'} "
        f"store={state['store']} own={state['own']} held={state['held']}\n"
    )
    if state["why"]:
        call.say(f"pyforwarder: not ready: {state['why']}")
    return FAILED if state["why"] else DONE


@command(name="take", example="pyforwarder fleet take --instance edge")
@click.option("--force", is_flag=True, help="Also if another host answers for one of them.")
def take(call: Call, force: bool) -> int:
    """Take the addresses that move: the machine that had them is dead.

    Its spliced pairs go on here.  Refused while another host answers for one of the addresses: for
    a machine that lives there is `fleet move`, to be said there.  The configuration says
    `fleet: {failover: {mover: command}}`.
    """
    from pyforwarder.runtime import moving_addresses as addresses

    control = call.control()
    state = control.failover()
    here, wanted = state["here"], state["addresses"]
    assert isinstance(here, list)
    assert isinstance(wanted, list)
    missing = [str(one) for one in wanted if one not in here]
    if not missing:
        call.say("pyforwarder: this machine has them already")
        return DONE
    if state["mover"] == "command" and not force:
        try:
            found = addresses.in_use(missing, wait_s=_PROBE_S)
        except OSError as error:
            raise ForwarderError(f"cannot ask whose the addresses are: {error}") from error
        if found:
            whose = ", ".join(f"{address} ({mac})" for address, mac in found.items())
            raise ForwarderError(
                f"another host answers for {whose}: `pyforwarder fleet move` there, or see to it "
                "that it is gone; --force takes them all the same"
            )
    call.write("".join(f"{one}\n" for one in control.take_addresses()))
    return DONE


@command(name="move", example="pyforwarder fleet move -c /etc/fleet.yaml two")
@click.argument("machine")
@_config
def move(call: Call, machine: str, config_path: Path) -> int:
    """Give the addresses that move to another machine of the fleet, without a gap.

    MACHINE is what it is called in the fleet (`instance`).  It takes the addresses first, then this
    one releases them, and of its spliced pairs, which go on there.  Say it on the machine that
    has them; on both the configuration says `fleet: {failover: {mover: command}}`.
    """
    import socket

    from pyforwarder.fleet.failover import moves
    from pyforwarder.fleet.failover.record import tag_of

    control = call.control()
    state = control.failover()
    if state["mover"] != "command":
        raise ForwarderError(
            "something else moves the addresses of this instance (`fleet.failover.mover`)"
        )
    here = state["here"]
    assert isinstance(here, list)
    if not here:
        raise ForwarderError(
            "this machine has none of the addresses: say it on the one that has them, or "
            "`pyforwarder fleet take` here if that is dead"
        )
    with _opened(config_path) as opened:
        own = opened.fleet.instance or socket.gethostname()
        if machine == own:
            raise UsageError(f"fleet move: {machine!r} is this machine")
        known = opened.keys.machines + tag_of(machine)
        if opened.store.get(known) is None:
            raise ForwarderError(
                f"no machine {machine!r} with `failover` has spoken to the store in ten minutes"
            )
        moves.ask(opened.store, opened.keys, own, machine, answer_s=scaled_s(_ANSWER_S))
    given = control.give_addresses()
    left = _wait_for_the_move(call, frozenset(map(str, given)))
    call.write("".join(f"{one}\n" for one in given))
    if left:
        have = "has" if left == 1 else "have"
        call.say(
            f"pyforwarder: {counted(left, 'spliced pair')} {have} not moved: "
            f"see the log of {machine!r}"
        )
        return FAILED
    return DONE


def _wait_for_the_move(call: Call, given: frozenset[str]) -> int:
    """Until this machine has no spliced pair with these addresses; how many are left after all."""
    control = call.control()
    until_s = time.monotonic() + scaled_s(_MOVED_S)
    while True:
        left = sum(
            row["datapath"] in OUTLIVING and _host_of(row["source"]) in given
            for row in control.pairs()
        )
        if not left or time.monotonic() > until_s:
            return left
        time.sleep(_LOOK_S)


def _host_of(endpoint: str) -> str:
    return endpoint.rpartition(":")[0].strip("[]")


def _show(call: Call, rows: list[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        call.write(json.dumps(rows, indent=2) + "\n")
    else:
        heads = [column.upper() for column in columns]
        call.write(tables.table(heads, rows, last_is_prose=True))


for _command in (put, get, diff, history, rollback, instances, clients, ready, move, take):
    fleet.add_command(_command)
