"""Commands that judge a configuration: explain, check."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyforwarder.cli.command import DONE, Call, command
from pyforwarder.errors import NotRunningError, UsageError

if TYPE_CHECKING:
    from pyforwarder.address import Address, HostPort
    from pyforwarder.config import Config, Listener
    from pyforwarder.routing import Decision, Explanation, Route

_BUILT_IN = "built-in"


@command(
    example="printf 18127.0.0.1:900102 | pyforwarder explain --file -\n"
    "pyforwarder explain --listener tls --hex '16 03 01'\n"
    "pyforwarder explain -c my.yaml --file client-hello.bin --json"
)
@click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge by this configuration.  [default: that of the running instance, else the built-in]",
)
@click.option("--listener", "listener_name", metavar="NAME", help="[default: the first one]")
@click.option("--hex", "hex_text", metavar="HEX", help="The first bytes; blanks and : are ignored.")
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="F",
    help="A file with the first bytes; - is stdin.",
)
@click.option("--client", metavar="IP:PORT", help="Where the client connects from.")
@click.option(
    "--end",
    "end_name",
    type=click.Choice(["open", "full", "timeout", "eof"]),
    default="open",
    help="Whether more bytes may come, and if not, why.  [default: open]",
)
@click.option("--json", "as_json", is_flag=True, help="The same as one JSON object.")
def explain(
    call: Call,
    config_path: Path | None,
    listener_name: str | None,
    hex_text: str | None,
    file: Path | None,
    client: str | None,
    end_name: str,
    as_json: bool,
) -> int:
    """Tell which rule would take these first bytes, and to where.

    And after how many of them, whether the destination is allowed, and why the other rules are
    not it.  Opens no connection; a name is resolved, because what is permitted are addresses.
    """
    data = _first_bytes(call, hex_text, file)
    source_address = _client_address(client)
    config, source = _config(call, config_path)
    from pyforwarder import routing
    from pyforwarder.address import Address
    from pyforwarder.key_files import load_token_keys, read_passwords

    index, listener = _listener(config, listener_name)
    end = routing.End(end_name)
    if len(data) >= listener.first_packet.max_bytes:
        data = data[: listener.first_packet.max_bytes]
        end = routing.End.FULL
    ruleset = routing.compile_rules(
        listener,
        load_token_keys(config),
        passwords=read_passwords(config),
        path=f"listeners[{index}]",
    )
    explanation = routing.explain(
        ruleset,
        data,
        client=source_address,
        local_port=listener.bind.port if isinstance(listener.bind, Address) else 0,
        end=end,
        now_unix_s=call.env.unix_time_s(),
    )
    verdict = _verdict(config, explanation.decision)
    call.write(
        _as_json(listener, source, data, explanation, verdict)
        if as_json
        else _as_text(listener, source, data, explanation, verdict)
    )
    return DONE


@command(example="pyforwarder check /etc/pyforwarder.yaml")
@click.argument(
    "file", metavar="[FILE]", required=False, type=click.Path(path_type=Path, allow_dash=True)
)
def check(call: Call, file: Path | None) -> int:
    """Validate a configuration; errors name the line and the key.

    Files with keys and passwords are read too.  Without FILE it is the built-in one; - is stdin.
    """
    from pyforwarder.config import load_config, parse_config
    from pyforwarder.key_files import load_token_keys, read_passwords
    from pyforwarder.routing import compile_rules

    if file == Path("-"):
        config = parse_config(_read_stdin(call).decode(errors="replace"), source="stdin")
    else:
        config = load_config(file)
    keys, passwords = load_token_keys(config), read_passwords(config)
    for index, listener in enumerate(config.listeners):
        compile_rules(listener, keys, passwords=passwords, path=f"listeners[{index}]")
    counts = (
        (len(config.listeners), "listener"),
        (sum(len(listener.rules) for listener in config.listeners), "rule"),
        (len(config.upstreams), "upstream"),
    )
    summary = ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts)
    name = {None: _BUILT_IN, Path("-"): "stdin"}.get(file, str(file))
    call.write(f"{name}: ok, {summary}\n")
    return DONE


def _first_bytes(call: Call, hex_text: str | None, file: Path | None) -> bytes:
    if (hex_text is None) == (file is None):
        raise UsageError("explain: wants either --hex or --file")
    if hex_text is not None:
        try:
            return bytes.fromhex(hex_text.replace(":", " "))
        except ValueError as error:
            raise UsageError(f"--hex {hex_text[:80]!r}: not pairs of hexadecimal digits") from error
    assert file is not None
    if file == Path("-"):
        return _read_stdin(call)
    try:
        with file.open("rb") as opened:
            return opened.read(_MAX_INPUT_BYTES)
    except OSError as error:
        raise UsageError(f"--file {file}: {error.strerror}") from error


_MAX_INPUT_BYTES = 1 << 20  # the most that first_packet.max_bytes and a configuration may have


def _read_stdin(call: Call) -> bytes:
    with os.fdopen(os.dup(call.env.stdin_fd), "rb") as stdin:
        return stdin.read(_MAX_INPUT_BYTES)


def _client_address(text: str | None) -> Address | None:
    from pyforwarder.address import Address, AddressError, parse_destination

    if text is None:
        return None
    try:
        client = parse_destination(text)
    except AddressError as error:
        raise UsageError(f"--client {error}") from error
    if not isinstance(client, Address):
        raise UsageError(f"--client {text}: an IP address, not a name")
    return client


def _config(call: Call, path: Path | None) -> tuple[Config, str]:
    """The configuration to judge by and what to call it."""
    from pyforwarder.config import load_config, parse_config

    if path is not None:
        return load_config(path), str(path)
    try:
        text, source = call.control().config()
    except NotRunningError:
        if call.instance_is_named:
            raise
        return load_config(None), _BUILT_IN
    return parse_config(text, source=source), source


def _listener(config: Config, name: str | None) -> tuple[int, Listener]:
    if name is None:
        return 0, config.listeners[0]
    for index, listener in enumerate(config.listeners):
        if listener.name == name:
            return index, listener
    names = ", ".join(listener.name for listener in config.listeners)
    raise UsageError(f"--listener {name!r}: there is none of that name, only {names}")


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What becomes of the connection, in words."""

    outcome: str  # route, refuse, need-more
    rule: str  # "-": none
    to: str
    skip: int  # bytes of the first packet that are ours
    allowed: bool | None  # None: nothing to allow, or not known without resolving
    why: str


def _verdict(config: Config, decision: Decision) -> _Verdict:
    from pyforwarder.routing import Refuse, Route

    if isinstance(decision, Route):
        allowed, why = _permission(config, decision)
        return _Verdict("route", decision.rule.name, str(decision.to), decision.skip, allowed, why)
    if isinstance(decision, Refuse):
        how = "a reset" if decision.reset else "a close"
        answer = f"{decision.reply.decode('ascii', 'backslashreplace')!r} and " * bool(
            decision.reply
        )
        name = decision.rule.name if decision.rule else "-"
        return _Verdict("refuse", name, "-", 0, None, f"{decision.reason.value}: {answer}{how}")
    return _Verdict("need-more", "-", "-", 0, None, "more bytes have to come first")


def _permission(config: Config, route: Route) -> tuple[bool | None, str]:
    """Whether the connection may be made, judged as `up` would."""
    from pyforwarder.address import Address, UnixAddress
    from pyforwarder.policy import OwnListeners

    destination = route.to
    if isinstance(destination, str):
        servers = ", ".join(str(s.address) for s in config.upstreams[destination].servers)
        return True, f"upstream {destination}: {servers}"
    if isinstance(destination, UnixAddress):
        return True, "the rule says so"
    addresses = [destination] if isinstance(destination, Address) else _resolve(destination)
    if not addresses:
        return None, f"{destination}: the name has no address here"
    own = OwnListeners(listener.bind for listener in config.listeners)
    for address in addresses:
        if own.includes(address, is_local=lambda _: False):
            return False, f"{address} is the forwarder itself"
        if route.rule.allow is not None:
            refusal = route.rule.allow.refusal(address.host, address.port)
            if refusal is not None:
                return False, f"{address}: {refusal}"
    by = "its `allow` has it" if route.rule.allow is not None else "the rule says so"
    names = "" if isinstance(destination, Address) else f"{', '.join(map(str, addresses))}: "
    return True, f"{names}{by}"


def _resolve(name: HostPort) -> list[Address]:
    import socket

    from pyforwarder.address import Address

    try:
        found = socket.getaddrinfo(name.name, name.port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(Address(str(sockaddr[0]), name.port) for *_, sockaddr in found))


def _as_json(
    listener: Listener, source: str, data: bytes, explanation: Explanation, verdict: _Verdict
) -> str:
    return (
        json.dumps(
            {
                "config": source,
                "listener": listener.name,
                "bytes": len(data),
                **asdict(verdict),
                "after_bytes": explanation.after_bytes,
                "said": [said.hex() for said in explanation.said],
                "rules": [
                    {
                        "rule": report.rule.name,
                        "outcome": report.outcome.value.replace(" ", "-"),
                        "after_bytes": report.after_bytes,
                        "why": report.why,
                    }
                    for report in explanation.rules
                ],
            },
            indent=2,
        )
        + "\n"
    )


def _as_text(
    listener: Listener, source: str, data: bytes, explanation: Explanation, verdict: _Verdict
) -> str:
    width = max(len("RULE"), *(len(report.rule.name) for report in explanation.rules))
    lines = [f"{'RULE':<{width}} OUTCOME   AFTER WHY"]
    lines += [
        f"{report.rule.name:<{width}} {report.outcome.value.replace(' ', '-'):<9} "
        f"{report.after_bytes:>5} {report.why}".rstrip()
        for report in explanation.rules
    ]
    lines.append("")
    after = f"after {explanation.after_bytes} of {len(data)} bytes"
    where = f"listener {listener.name} ({source})"
    match verdict.outcome:
        case "route":
            lines.append(f"{where}: rule {verdict.rule} takes it {after}, to {verdict.to}")
            lines.append(
                f"{_PERMISSION[verdict.allowed]}: {verdict.why}; "
                f"{verdict.skip} of the bytes are the forwarder's own"
            )
        case "refuse":
            by = "no rule takes it" if verdict.rule == "-" else f"rule {verdict.rule} refuses it"
            lines.append(f"{where}: {by}, decided {after}")
            lines.append(f"refused: {verdict.why}")
        case _:
            lines.append(f"{where}: undecided {after}; {verdict.why}")
    return "\n".join(lines) + "\n"


_PERMISSION = {True: "allowed", False: "denied", None: "not known"}
