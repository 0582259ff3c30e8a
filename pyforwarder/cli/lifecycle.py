"""Commands that start, stop and change a daemon: up, down, reload, upgrade."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from pyforwarder.cli import completion
from pyforwarder.cli.command import DONE, FAILED, Call, command
from pyforwarder.core.datapaths import NAMES
from pyforwarder.core.wording import counted
from pyforwarder.errors import UsageError
from pyforwarder.runtime.slowness import scaled_s

# What a daemon may need after its own drain deadline to close, unpin and unlock.
_AFTER_DRAIN_S = 15.0
_DEFAULT_DRAIN_S = 30.0  # `timeouts.drain` of the built-in configuration


@command(
    example="pyforwarder up -c /etc/pyforwarder.yaml\n"
    "pyforwarder up --listen 127.0.0.1:9000 --datapath copy --instance test"
)
@click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration; without it one listener on 127.0.0.1:9999 for loopback destinations.",
)
@click.option("--listen", metavar="ADDR", help="Bind the first listener here instead.")
@click.option(
    "--datapath", type=click.Choice(NAMES), help="What moves the bytes, for every listener."
)
@click.option(
    "--prove", is_flag=True, help="Prove the kernel's datapaths, though they were since the boot."
)
@click.option("--detach", is_flag=True, help="Return once it listens; it runs in the background.")
def up(
    call: Call,
    config_path: Path | None,
    listen: str | None,
    datapath: str | None,
    prove: bool,
    detach: bool,
) -> int:
    """Start forwarding; stays in the foreground.

    Prints one line per listener once it accepts.  SIGTERM or Ctrl-C drains and ends (a second one
    at once), SIGHUP reads the configuration again.  A daemon that drains gives its pairs to this
    one.
    """
    if listen is not None:
        _check_listen(listen)
    from pyforwarder import supervisor

    control = call.control()
    return supervisor.run(
        call.env,
        supervisor.UpOptions(
            instance=call.instance_name,
            config_path=config_path,
            listen=listen,
            datapath=datapath,
            detach=detach,
            verbosity=call.verbosity,
            prove=prove,
        ),
        lambda do, fds: control.request(do, fds_sent=fds),
    )


def _check_listen(listen: str) -> None:
    from pyforwarder.core.address import AddressError, parse_bind

    try:
        parse_bind(listen)
    except AddressError as error:
        raise UsageError(f"--listen {error}") from error


@command(example="pyforwarder down\npyforwarder down --now --instance test")
@click.option("--now", is_flag=True, help="Reset what is left instead of waiting for its end.")
def down(call: Call, now: bool) -> int:
    """Stop accepting, let the pairs end, and stop.

    Returns when the daemon is gone.
    """
    from pyforwarder.runtime.instance import LockWatch, is_running, pid_of

    control = call.control()
    before = pid_of(call.instance)
    # Made before the request: a daemon that has gone by the time we look, and another one that was
    # started in its place, must not be confused.
    with LockWatch(call.instance) as watch:
        answer = control.down(now=now)
        watch.follow(answer.get("lock"))  # another one may have taken its place since
        drain_s = answer.get("drain_s")
        if not isinstance(drain_s, int | float):
            drain_s = _DEFAULT_DRAIN_S
        timeout_s = (0.0 if now else float(drain_s)) + scaled_s(_AFTER_DRAIN_S)
        if not watch.wait_free(timeout_s=timeout_s):
            call.say(
                f"pyforwarder: instance {call.instance_name!r} has not ended after "
                f"{timeout_s:g} s{'' if now else '; `down --now` resets what is left'}"
            )
            return FAILED
        reset = watch.reset_pairs()
    after = pid_of(call.instance)
    if after not in (None, before) and is_running(call.instance):
        ended = "the daemon before" if before is None else f"the daemon before (pid {before})"
        summary = f"{ended} has ended; instance {call.instance_name!r} runs as pid {after}"
    else:
        summary = f"instance {call.instance_name!r} stopped"
    call.say(summary + _resets(reset))
    return DONE


def _resets(pairs: int) -> str:
    return f"; {counted(pairs, 'pair')} reset" if pairs else ""


@command(
    example="pyforwarder server web/10.0.0.1:443 drain\npyforwarder server web/10.0.0.1:443 ready"
)
@click.argument("server", metavar="UPSTREAM/SERVER", shell_complete=completion.servers)
@click.argument("state", type=click.Choice(("drain", "ready")))
def server(call: Call, server: str, state: Literal["drain", "ready"]) -> int:
    """Let a server take no new pairs, or new ones again.

    A drained server keeps its pairs, and `show upstreams` says so.  That holds through reloads, as
    long as the server is configured, and until the daemon ends.
    """
    if "/" not in server:
        raise UsageError(
            f"server {server!r}: write UPSTREAM/SERVER, as `pyforwarder show upstreams` has them"
        )
    answer = call.control().set_server(server, state)
    words = "no new pairs" if state == "drain" else "takes new pairs"
    if state == "ready" and answer.get("weight") == 0:
        words = "no new pairs: its weight is 0 in the configuration"
    call.say(f"{server}: {words}")
    return DONE


@command(example="pyforwarder reload")
def reload(call: Call) -> int:
    """Read the configuration again; an error changes nothing.

    Live pairs are not touched.
    """
    answer = call.control(timeout_s=30.0).reload()
    count = answer.get("listeners")
    assert isinstance(count, int)
    call.say(f"reloaded: {counted(count, 'listener')}")
    if isinstance(waiting := answer.get("waiting"), list) and waiting:
        call.say(f"changed, but fixed until the next `up`: {', '.join(map(str, waiting))}")
    return DONE


@command(example="pyforwarder upgrade\n/opt/pyforwarder-0.2/bin/pyforwarder upgrade -c new.yaml")
@click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Another configuration; without it that of the running daemon, read again.",
)
def upgrade(call: Call, config_path: Path | None) -> int:
    """Put this version in the running daemon's place, without a loss.

    The new daemon starts beside it, proves its datapaths and takes its listeners; once its workers
    accept, it gets the pairs.  If anything fails, the running daemon goes on as before.
    """
    from pyforwarder import __version__, supervisor

    control = call.control(timeout_s=15.0)
    control.ping()  # where there is none that is said here
    remark = supervisor.upgrade(
        call.env,
        call.instance,
        config_path,
        lambda fd: control.request("succeed", fds_sent=[fd]),
    )
    call.say(f"instance {call.instance_name!r} is version {__version__} now")
    if remark:
        call.say(remark)
    return DONE
