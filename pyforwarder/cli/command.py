"""What every command shares: its options, the environment it gets, and how it may fail.

Verbs change something, nouns and `show` only read.  Data goes to stdout, words to stderr; an error
is one line (with `-v` its traceback as well).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import click

from pyforwarder import __version__
from pyforwarder.cli import completion
from pyforwarder.errors import ForwarderError, LoadError
from pyforwarder.runtime import slowness
from pyforwarder.runtime.instance import DEFAULT_NAME, Instance
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.tables import one_line, visible

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyforwarder.client import ControlClient
    from pyforwarder.runtime.environment import Environment

P = ParamSpec("P")

DONE = 0
FAILED = 1


@dataclass(slots=True)
class Call:
    """One run of one command: its world and the options that every command has."""

    env: Environment
    instance_name: str = DEFAULT_NAME
    instance_is_named: bool = False  # whether --instance was given
    verbosity: int = 0
    command: str = field(default="pyforwarder")

    @property
    def instance(self) -> Instance:
        """The paths of the instance that was asked for."""
        return Instance.named(self.instance_name, self.env.environ)

    def control(self, *, timeout_s: float = 10.0) -> ControlClient:
        """A client of that instance's control socket; `timeout_s` is for a usual host."""
        from pyforwarder.client import ControlClient

        return ControlClient(self.instance, timeout_s=scaled_s(timeout_s))

    def say(self, words: str) -> None:
        """One line of words to stderr."""
        self.env.say(words)

    def write(self, data: str) -> None:
        """Data to stdout, flushed: a pipe's reader must not wait for a full buffer.

        What comes from clients is in it: a terminal gets nothing to obey.
        """
        self.env.stdout.write(visible(data))
        self.env.stdout.flush()


class _Root(click.Group):
    """The command group; lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _take_instance(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        call = context.find_object(Call)
        assert call is not None
        call.instance_name = value
        call.instance_is_named = True


def _take_verbose(context: click.Context, _: click.Parameter, value: int) -> None:
    call = context.find_object(Call)
    assert call is not None
    call.verbosity += value


def _common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--instance and -v, taken before the command as well as after it."""
    function = click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_take_verbose,
        help="Say more; errors come with a traceback.",
    )(function)
    return click.option(
        "--instance",
        metavar="NAME",
        expose_value=False,
        callback=_take_instance,
        shell_complete=completion.instances,
        help=f"Which instance; several run side by side.  [default: {DEFAULT_NAME}]",
    )(function)


def command(
    *, example: str, name: str | None = None
) -> Callable[[Callable[Concatenate[Call, P], int | None]], click.Command]:
    """Make a function the command of its name; it gets a `Call` and returns its exit code.

    `None` counts as done.  `example` goes to the end of its help, line by line as it is.
    """

    def decorate(function: Callable[Concatenate[Call, P], int | None]) -> click.Command:
        lines = "\n".join(f"  {line}" for line in example.splitlines())
        return click.command(
            name=name or function.__name__,
            epilog=f"\b\nExample:\n{lines}",  # \b: click does not wrap what follows
        )(click.pass_obj(_common_options(function)))

    return decorate


def group(*, example: str, name: str) -> Callable[[Callable[[], None]], click.Group]:
    """Make a function the group of commands of that name; what it does is in its docstring."""

    def decorate(function: Callable[[], None]) -> click.Group:
        lines = "\n".join(f"  {line}" for line in example.splitlines())
        return click.group(cls=_Root, name=name, epilog=f"\b\nExample:\n{lines}")(
            _common_options(function)
        )

    return decorate


@click.group(
    cls=_Root,
    name="pyforwarder",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="\b\nExample:\n  pyforwarder up --listen 127.0.0.1:9999 &\n  pyforwarder show",
)
@_common_options
@click.version_option(__version__, prog_name="pyforwarder", message="%(prog)s %(version)s")
def root() -> None:
    """Forward TCP and UDP by the first packet; the kernel moves the bytes."""


def run(arguments: list[str], env: Environment) -> int:
    """Run the command that `arguments` name and turn every end into an exit code."""
    call = Call(env)
    try:
        slowness.factor(env.environ)  # said before anything waits by it
        # click prints help and the version to sys.stdout; everything else here asks `env`
        with contextlib.redirect_stdout(env.stdout), contextlib.redirect_stderr(env.stderr):
            result = root.main(
                args=arguments, prog_name="pyforwarder", standalone_mode=False, obj=call
            )
        env.stdout.flush()
        return result if isinstance(result, int) else DONE
    except click.exceptions.NoArgsIsHelpError as error:
        error.show(file=env.stderr)
        return error.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "pyforwarder"
        env.say(f"{path}: {error.format_message()} (see {path} --help)")
        return error.exit_code
    except click.ClickException as error:
        env.say(f"pyforwarder: {error.format_message()}")
        return error.exit_code
    except ForwarderError as error:
        _trace(call)
        env.say(f"pyforwarder: {error}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        env.say("pyforwarder: interrupted")
        return FAILED
    except BrokenPipeError:
        # the reader of our stdout has left; so that python's own last flush does not complain
        _discard_stdout(env)
        return FAILED
    except SystemExit as error:
        # click makes this of EPIPE; `top` of a signal
        _discard_stdout(env)
        return error.code if isinstance(error.code, int) else FAILED
    except Exception as error:
        _trace(call)
        env.say(f"pyforwarder: internal error: {_named(error)}{_hint(call)}")
        return FAILED


def _trace(call: Call) -> None:
    if call.verbosity:
        call.env.say(traceback.format_exc().rstrip())
        error = sys.exception()
        if isinstance(error, LoadError) and error.log:
            call.env.say(error.log.rstrip())


def _named(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")


def _hint(call: Call) -> str:
    return "" if call.verbosity else " (-v shows where)"


def _discard_stdout(env: Environment) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, env.stdout_fd)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
    finally:
        os.close(nowhere)
