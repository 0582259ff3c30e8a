"""Commands that judge a configuration: explain, check."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyforwarder.cli.command import DONE, Call, command
from pyforwarder.cli.completion import listeners
from pyforwarder.core.wording import counted
from pyforwarder.errors import ConfigError, NotRunningError, UsageError
from pyforwarder.runtime.tables import printable

if TYPE_CHECKING:
    from pyforwarder.config import Config, Listener
    from pyforwarder.config.document import Node
    from pyforwarder.config.explaining import Judged
    from pyforwarder.core.address import Address, HostPort

_BUILT_IN = "built-in"


@command(
    example="printf 18127.0.0.1:900102 | pyforwarder explain --file -\n"
    "pyforwarder explain --listener tls --hex '16 03 01'\n"
    "pyforwarder explain -c my.yaml --file client-hello.bin --json\n"
    "pyforwarder explain -c my.yaml --udp --file one.bin --file two.bin"
)
@click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Judge by this configuration.  [default: that of the running instance, else the built-in]",
)
@click.option(
    "--listener",
    "listener_name",
    metavar="NAME",
    shell_complete=listeners,
    help="[default: the first one]",
)
@click.option(
    "--udp",
    "is_udp",
    is_flag=True,
    help="A client of the first UDP listener; --listener names one.",
)
@click.option(
    "--hex",
    "hex_texts",
    metavar="HEX",
    multiple=True,
    help="The first bytes; blanks and : are ignored.  Of UDP each is a datagram.",
)
@click.option(
    "--file",
    "files",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="F",
    multiple=True,
    help="A file with the first bytes, or with a datagram; - is stdin.",
)
@click.option("--client", metavar="IP:PORT", help="Where the client connects from.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    metavar="PORT",
    help="The listener's port that it connects to.  [default: its first]",
)
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
    is_udp: bool,
    hex_texts: tuple[str, ...],
    files: tuple[Path, ...],
    client: str | None,
    port: int | None,
    end_name: str,
    as_json: bool,
) -> int:
    """Tell which rule would take these first bytes, and to where.

    And after how many of them, whether the destination is allowed, and why the other rules are
    not it.  Opens no connection; a name is resolved, because what is permitted are addresses.
    """
    pieces = _pieces(call, hex_texts, files)
    source_address = _client_address(client)
    config, source = _config(call, config_path)
    from pyforwarder.config.explaining import judge
    from pyforwarder.config.key_files import load_token_keys, read_passwords
    from pyforwarder.core.routing import End

    index = _listener_index(config, listener_name, is_udp=is_udp)
    _check_port(config.listeners[index], port)
    judged = judge(
        config,
        index,
        pieces,
        client=source_address,
        port=port,
        end=End(end_name),
        now_unix_s=call.env.unix_time_s(),
        keys=load_token_keys(config),
        passwords=read_passwords(config),
        resolve=_resolve,
    )
    if as_json:
        call.write(json.dumps({"config": source, **judged.as_json()}, indent=2) + "\n")
    else:
        call.write(_as_text(judged, source))
    return DONE


@command(
    example="pyforwarder check /etc/pyforwarder.yaml\n"
    "pyforwarder check --dump my.yaml > complete.yaml"
)
@click.argument(
    "file", metavar="[FILE]", required=False, type=click.Path(path_type=Path, allow_dash=True)
)
@click.option("--dump", is_flag=True, help="Print it as YAML, with every default written out.")
def check(call: Call, file: Path | None, dump: bool) -> int:
    """Validate a configuration; errors name the line and the key.

    A warning tells of what is hardly meant: a rule that never matches, a key file that others
    may read, a user that this host does not have.

    Files with keys, certificates and passwords are read too.  Without FILE it is the built-in one;
    - is stdin.
    """
    from pyforwarder.config import load_whole, parse_config, validated
    from pyforwarder.config.document import read_document
    from pyforwarder.config.dump import dump_config
    from pyforwarder.config.key_files import load_token_keys, placed, read_passwords
    from pyforwarder.config.warnings import config_warnings
    from pyforwarder.core.rule_compiling import compile_rules

    name = {None: _BUILT_IN, Path("-"): "stdin"}.get(file, str(file))
    document: Node | str = ""
    if file is None or file == Path("-"):
        document = "" if file is None else _read_stdin(call).decode(errors="replace")
        config = parse_config(document, source=name)
    else:
        document = load_whole(file).document
        config = validated(document, source=name)
    try:
        keys, passwords = load_token_keys(config), read_passwords(config)
        if config.fleet is not None:
            from pyforwarder.fleet.files import read_files

            read_files(config.fleet)
    except ConfigError as error:
        whole = read_document(document, source=name) if isinstance(document, str) else document
        raise placed(error, whole, source=name) from error
    for index, listener in enumerate(config.listeners):
        compile_rules(listener, keys, passwords=passwords, path=f"listeners[{index}]")
    counts = (
        (len(config.listeners), "listener"),
        (sum(len(listener.rules) for listener in config.listeners), "rule"),
        (len(config.upstreams), "upstream"),
    )
    summary = ", ".join(counted(count, noun) for count, noun in counts)
    for warning in config_warnings(config, document, source=name):
        call.say(f"warning: {warning}")
    if dump:
        call.write(dump_config(config))
    else:
        call.write(f"{name}: ok, {summary}\n")
    return DONE


def _pieces(call: Call, hex_texts: tuple[str, ...], files: tuple[Path, ...]) -> list[bytes]:
    if bool(hex_texts) == bool(files):
        raise UsageError("explain: wants either --hex or --file")
    return [*map(_from_hex, hex_texts), *(_from_file(call, file) for file in files)]


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text.replace(":", " "))
    except ValueError as error:
        raise UsageError(f"--hex {text[:80]!r}: not pairs of hexadecimal digits") from error


def _from_file(call: Call, file: Path) -> bytes:
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
    from pyforwarder.core.address import Address, AddressError, parse_destination

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


def _listener_index(config: Config, name: str | None, *, is_udp: bool) -> int:
    for index, listener in enumerate(config.listeners):
        if is_udp and listener.protocol != "udp":
            if listener.name == name:
                raise UsageError(f"--udp: the listener {name!r} takes TCP")
            continue
        if name is None or listener.name == name:
            return index
    if name is None:
        raise UsageError("--udp: no listener says `protocol: udp`")
    names = ", ".join(listener.name for listener in config.listeners)
    raise UsageError(f"--listener {name!r}: there is none of that name, only {names}")


def _check_port(listener: Listener, port: int | None) -> None:
    from pyforwarder.core.address import Address, SystemdSockets, bind_text

    binds = listener.addresses
    ports = {bind.port for bind in binds if isinstance(bind, Address)}
    # The kernel chooses for port 0, and systemd knows its sockets.
    is_known = 0 not in ports and not any(isinstance(one, SystemdSockets) for one in listener.bind)
    if port is not None and is_known and port not in ports:
        raise UsageError(f"--port {port}: {listener.name} listens on {bind_text(binds)}")


def _resolve(name: HostPort) -> list[Address]:
    import socket

    from pyforwarder.core.address import Address

    try:
        found = socket.getaddrinfo(name.name, name.port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(Address(str(sockaddr[0]), name.port) for *_, sockaddr in found))


def _as_text(judged: Judged, source: str) -> str:
    explanation, verdict = judged.explanation, judged.verdict
    width = max(len("RULE"), *(len(report.rule.name) for report in explanation.rules))
    lines = [f"{'RULE':<{width}} OUTCOME   AFTER WHY"]
    lines += [
        f"{report.rule.name:<{width}} {report.outcome.value.replace(' ', '-'):<9} "
        f"{report.after_bytes:>5} {printable(report.why)}".rstrip()
        for report in explanation.rules
    ]
    lines.append("")
    after = f"after {explanation.after_bytes} of {counted(judged.size, 'byte')}"
    if judged.datagrams:
        after += f" ({explanation.after_datagrams} of {counted(judged.datagrams, 'datagram')})"
    where = f"listener {judged.listener.name} ({source})"
    match verdict.outcome:
        case "route":
            to = printable(verdict.to)
            lines.append(f"{where}: rule {verdict.rule} takes it {after}, to {to}")
            lines.append(
                f"{_PERMISSION[verdict.allowed]}: {printable(verdict.why)}; "
                f"{verdict.skip} of the bytes are the forwarder's own"
            )
        case "refuse":
            by = "no rule takes it" if verdict.rule == "-" else f"rule {verdict.rule} refuses it"
            lines.append(f"{where}: {by}, decided {after}")
            lines.append(f"refused: {printable(verdict.why)}")
        case _:
            lines.append(f"{where}: undecided {after}; {verdict.why}")
    if verdict.outcome == "route":
        lines.append(_where_decided(judged))
    shares = judged.in_kernel.shares([report.rule.name for report in explanation.rules])
    if shares is not None:
        kernel, other, why = shares
        by_kernel = f"the kernel decides by {', '.join(kernel) or 'no rule'}"
        lines.append(
            f"{by_kernel}, not by {other}: {printable(why)}" if other else f"{by_kernel}: all"
        )
    return "\n".join(lines) + "\n"


def _where_decided(judged: Judged) -> str:
    in_kernel = judged.in_kernel
    if in_kernel.decided == "kernel":
        return "decided in the kernel, once it has seen how the server is reached"
    could = "could decide the same" if in_kernel.rule is not None else f"could not: {in_kernel.why}"
    return f"decided in userspace; the kernel {could}"


_PERMISSION = {True: "allowed", False: "denied", None: "not known"}
