"""Commands that speak the instruction: connect, token."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pyforwarder.cli.command import DONE, Call, command
from pyforwarder.errors import ControlError, ForwarderError, NotRunningError, UsageError

if TYPE_CHECKING:
    from pyforwarder.core.address import Address, UnixAddress

_AUD_HELP = "With --key: only the gateway of this name takes it (tokens: {audience: NAME})."
_NONCE_HELP = "With --key: as gateways of version 0.1 take it; two of one second may be the same."
_WITH_NONCE_HELP = "Makes it another one than those to DEST that end in the same second."
_KEY_HELP = "Sign with the key in FILE; ID is its name there (default: FILE's without .key)."


@command(
    example="ssh -o ProxyCommand='pyforwarder connect %h:%p --via gateway:9999' 10.0.0.5\n"
    "echo hello | pyforwarder connect 127.0.0.1:9001"
)
@click.argument("destination", metavar="DEST")
@click.option(
    "--via",
    metavar="ADDR",
    help="The forwarder.  [default: the instance's first TCP listener if it runs on this host "
    "and we may ask it, else 127.0.0.1:9999]",
)
@click.option("--key", metavar="[ID=]FILE", help=_KEY_HELP)
@click.option("--from", "source", metavar="CIDR", help="With --key: clients it is good for.")
@click.option("--aud", "audience", metavar="NAME", help=_AUD_HELP)
@click.option("--no-nonce", is_flag=True, help=_NONCE_HELP)
@click.option(
    "--expires",
    "lifetime_s",
    type=click.IntRange(1, 86400),
    default=60,
    metavar="SECONDS",
    help="With --key: how long the instruction is good.  [default: 60]",
)
@click.option("--no-ack", is_flag=True, help="Wait for no answer (rules with `ack: false`).")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.1),
    default=30.0,
    metavar="SECONDS",
    help="For the answer.  [default: 30]",
)
def connect(
    call: Call,
    destination: str,
    via: str | None,
    key: str | None,
    source: str | None,
    audience: str | None,
    no_nonce: bool,
    lifetime_s: int,
    no_ack: bool,
    timeout_s: float,
) -> int:
    """Connect stdin and stdout to DEST through a forwarder.

    DEST is ip:port, [ip6]:port or name:port.  End of file on stdin closes that direction only;
    ends when both directions have, and fails if bytes were lost.
    """
    from pyforwarder import client
    from pyforwarder.cli.relay import relay

    connection = client.connect(
        destination,
        via=via or _running_listener(call) or client.DEFAULT_VIA,
        key=_read_key(key) if key else None,
        source=source,
        audience=audience,
        nonce=not no_nonce,
        lifetime_s=lifetime_s,
        ack=not no_ack,
        timeout_s=timeout_s,
    )
    relay(connection, stdin_fd=call.env.stdin_fd, stdout_fd=call.env.stdout_fd)
    return DONE


def _running_listener(call: Call) -> str | None:
    """Where the instance's first TCP listener can be reached from here, if we may know."""
    from pyforwarder.core.address import AddressError, parse_bind

    try:
        listeners = call.control().listeners()
    except (NotRunningError, ControlError):
        if call.instance_is_named:
            raise
        return None
    except ForwarderError:  # not root: any user may connect, only root may ask
        return None
    for row in listeners:
        if row["protocol"] == "tcp":
            try:
                return str(_reachable(parse_bind(row["bind"])))
            except AddressError:
                continue
    return None


def _reachable(bind: Address | UnixAddress) -> Address | UnixAddress:
    from pyforwarder.core.address import Address

    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    if isinstance(bind, Address):
        return Address(loopback.get(bind.host, bind.host), bind.port)
    return bind


@command(
    example="pyforwarder token --new /etc/pyforwarder/ops.key\n"
    "pyforwarder token 10.0.0.5:22 --key /etc/pyforwarder/ops.key"
)
@click.argument("destination", metavar="[DEST]", required=False)
@click.option("--key", metavar="[ID=]FILE", help=_KEY_HELP)
@click.option("--from", "source", metavar="CIDR", help="Good for clients from there only.")
@click.option("--aud", "audience", metavar="NAME", help=_AUD_HELP)
@click.option("--nonce", is_flag=True, help=_WITH_NONCE_HELP)
@click.option(
    "--expires",
    "lifetime_s",
    type=click.IntRange(1, 10 * 365 * 86400),
    default=60,
    metavar="SECONDS",
    help="How long it is good.  [default: 60]",
)
@click.option(
    "--new", "new_file", type=click.Path(path_type=Path), metavar="FILE", help="Make a key file."
)
def token(
    call: Call,
    destination: str | None,
    key: str | None,
    source: str | None,
    audience: str | None,
    nonce: bool,
    lifetime_s: int,
    new_file: Path | None,
) -> int:
    """Print a signed instruction, or make a key.

    For clients that have no key of their own.  The output ends in CR LF, as the instruction does:
    send it as it is.
    """
    if new_file is not None:
        if destination or key or source or audience:
            raise UsageError("token: --new stands alone")
        _write_new_key(new_file)
        call.say(f"{new_file}: a new key; copy it to those who may sign")
        return DONE
    if not (destination and key):
        raise UsageError("token: wants DEST and --key, or --new")
    from pyforwarder import client

    line = client.instruction(
        destination,
        key=_read_key(key),
        source=source,
        audience=audience,
        nonce=nonce,
        expires_unix_s=int(call.env.unix_time_s()) + lifetime_s,
    )
    call.env.stdout.flush()
    # bytes, not text: a text stream may turn the line end into another one
    os.write(call.env.stdout_fd, line)  # at most 512 bytes: written whole, PIPE_BUF is more
    return DONE


def _read_key(text: str) -> tuple[str, bytes]:
    """The id and the secret that `[ID=]FILE` names."""
    from pyforwarder.core.token import key_from_file

    key_id, equals, name = text.partition("=")
    if not equals or "/" in key_id:  # a path may have an = in it, an id has no slash
        path = Path(text)
        key_id = path.name.removesuffix(".key")
    else:
        path = Path(name)
    try:
        return key_id, key_from_file(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--key {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--key {path}: {error}") from error


def _write_new_key(path: Path) -> None:
    """A key file only we can read; an existing one is not touched."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ForwarderError(f"{path}: {error.strerror}") from error
    # Text, so that an editor or a terminal does not damage it: 32 random bytes as 64 digits.
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_hex(32) + "\n")


@command(
    example="install -m 600 /dev/null /etc/pyforwarder/alice.password\n"
    "pyforwarder password > /etc/pyforwarder/alice.password\n"
    'printf %s "$PASSWORD" | pyforwarder password'
)
def password(call: Call) -> int:
    """Print the hash of a password, for a file of `users`.

    Asks for it twice at a terminal, and reads one line elsewhere.  By Argon2id; files may also have
    what others made by bcrypt (`$2b$`), or a password as it is.
    """
    from pyforwarder.core.password import make_hash

    if os.isatty(call.env.stdin_fd):
        given = click.prompt(
            "Password", hide_input=True, confirmation_prompt=True, err=True
        ).encode()
    else:
        with os.fdopen(os.dup(call.env.stdin_fd), "rb") as stdin:
            given = stdin.readline(_MOST_PASSWORD_BYTES + 2).removesuffix(b"\n")
    if not 1 <= len(given) <= _MOST_PASSWORD_BYTES:
        raise UsageError(f"password: it has 1 to {_MOST_PASSWORD_BYTES} bytes (RFC 1929)")
    call.write(make_hash(given) + "\n")
    return DONE


_MOST_PASSWORD_BYTES = 255  # RFC 1929 counts it in one byte
