"""The command line: every command against a control server on a real unix socket."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from pyforwarder.cli.command import root
from pyforwarder.errors import NotRunningError
from pyforwarder.runtime import tables
from pyforwarder.runtime.host import Capability
from pyforwarder.runtime.instance import InstanceLock
from pyforwarder.runtime.slowness import scaled_s
from tests.helpers.command import UNIX_TIME_S, run
from tests.helpers.fake_control import (
    PAIR,
    Answer,
    FakeControl,
    Refusal,
    Request,
    make_instance,
)
from tests.helpers.first_packets import client_hello
from tests.helpers.instruction import instruction
from tests.helpers.quic import hello, split_hello

if TYPE_CHECKING:
    from pyforwarder.runtime.environment import Environment

COMMANDS = sorted(root.commands)
INNER = sorted(
    f"{name} {inner}"
    for name, group in root.commands.items()
    if isinstance(group, click.Group)
    for inner in group.commands
)
# All of section 3.2 of the design; a new command is no reason to change this line.
CONTRACT = {
    *("up", "down", "show", "top", "reload", "flush", "forward", "explain", "connect"),
    *("check", "doctor", "demo"),
}


def answers(**results: object) -> Answer:
    """An answer per request, by what it asks to `do`."""
    return lambda request, _fds: results[request["do"]]


# ---------------------------------------------------------------------- help and usage


def test_every_command_of_the_contract_is_there() -> None:
    assert set(COMMANDS) >= CONTRACT


@pytest.mark.parametrize("command", COMMANDS + INNER)
def test_help_has_an_example_and_the_options_of_every_command(tmp_path: Path, command: str) -> None:
    done = run(tmp_path, *command.split(), "--help")
    assert (done.code, done.stderr) == (0, "")
    assert "--instance NAME" in done.stdout
    assert "-v, --verbose" in done.stdout
    example = done.stdout.partition("Example:\n")[2]
    assert f"pyforwarder {command}" in example
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_top_level_help_shows_each_command_in_one_whole_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert (done.code, done.stderr) == (0, "")
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout
    assert "..." not in done.stdout.partition("Commands:")[2].partition("Example:")[0]


def test_help_needs_neither_bcc_nor_what_is_slow_to_import() -> None:
    """Measured in a process of its own: which modules `--help` of every command brings in."""
    program = (
        "import sys, io, contextlib\n"
        "from pyforwarder.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    for command in {COMMANDS!r}:\n"
        "        assert main([command, '--help']) == 0, command\n"
        "print(*sorted(module.partition('.')[0] for module in sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=scaled_s(30),
        check=True,
    )
    imported = set(done.stdout.split())
    assert "click" in imported
    unwanted = {"bcc", "pydantic", "rich", "yaml", "psutil", "prometheus_client", "pyroute2", "re2"}
    assert imported & unwanted == set()


def test_version_is_printed(tmp_path: Path) -> None:
    from pyforwarder import __version__

    assert run(tmp_path, "--version").stdout == f"pyforwarder {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["show", "--frobnicate"],
        ["show", "everything"],
        ["flush"],
        ["flush", "1", "--all"],
        ["flush", "one"],
        ["forward", "1", "2"],
        ["forward", "0", "2", "3"],
        ["forward", "1", "3", "3"],
        ["explain"],
        ["explain", "--hex", "31", "--file", "x"],
        ["explain", "--hex", "3"],
        ["explain", "--hex", "zz"],
        ["explain", "--file", "/nonexistent"],
        ["explain", "--hex", "31", "--listener", "nobody"],
        ["explain", "--hex", "31", "--client", "example.com:1"],
        ["connect"],
        ["connect", "nowhere", "--via", "127.0.0.1:1"],
        ["connect", "127.0.0.1:1", "--via", "nowhere"],
        ["connect", "127.0.0.1:1", "--key", "/nonexistent"],
        ["token"],
        ["token", "127.0.0.1:1"],
        ["top"],
        ["up", "--datapath", "magic"],
        ["up", "--listen", "example.com:80"],
        ["show", "--instance", "a/b"],
        ["check", "/nonexistent.yaml"],
    ],
)
def test_wrong_usage_is_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path, words: list[str]
) -> None:
    done = run(tmp_path, *words)
    assert (done.code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("pyforwarder")


@pytest.mark.parametrize(
    "words",
    [
        ["show"],
        ["show", "stats", "--json"],
        ["show", "--watch"],
        ["down"],
        ["down", "--now"],
        ["reload"],
        ["flush", "--all"],
        ["forward", "1", "2", "3"],
        ["explain", "--hex", "31"],
        ["connect", "127.0.0.1:1"],
    ],
)
def test_no_such_instance_is_exit_code_3(tmp_path: Path, words: list[str]) -> None:
    done = run(tmp_path, *words, "--instance", "lab")
    assert (done.code, done.stdout) == (3, "")
    assert done.stderr == "pyforwarder: instance 'lab' is not running\n"


def test_options_of_every_command_may_stand_before_it(tmp_path: Path) -> None:
    with FakeControl(make_instance(tmp_path, "lab"), answers(show=[])):
        assert run(tmp_path, "--instance", "lab", "show").code == 0
        assert run(tmp_path, "--instance", "other", "show", "--instance", "lab").code == 0


def test_refusal_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    def refuse(*_: object) -> object:
        raise Refusal("pid 1: no such descriptor", kind="refused")

    with FakeControl(make_instance(tmp_path), refuse):
        done = run(tmp_path, "forward", "1", "2", "3")
        assert (done.code, done.stdout) == (1, "")
        assert done.stderr == "pyforwarder: pid 1: no such descriptor\n"
        wordy = run(tmp_path, "forward", "1", "2", "3", "-v")
    assert wordy.code == 1
    assert wordy.stderr.startswith("Traceback")
    assert wordy.stderr.endswith("pyforwarder: pid 1: no such descriptor\n")


def test_our_own_fault_is_one_line_too(tmp_path: Path) -> None:
    with FakeControl(make_instance(tmp_path), answers(show=[{"id": 1}, 3])):
        done = run(tmp_path, "show")
    assert done.code == 1
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------- show


def test_show_prints_the_table_of_pairs(tmp_path: Path) -> None:
    with FakeControl(make_instance(tmp_path), answers(show=[dict(PAIR)])) as control:
        done = run(tmp_path, "show")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout == tables.render("pairs", [PAIR])
    assert control.requests == [{"do": "show", "what": "pairs"}]


def test_show_json_is_every_field_of_the_daemons_rows(tmp_path: Path) -> None:
    with FakeControl(make_instance(tmp_path), answers(show=[dict(PAIR)])):
        done = run(tmp_path, "show", "--json")
    assert json.loads(done.stdout) == [PAIR]


@pytest.mark.parametrize("what", ["listeners", "rules", "upstreams", "stats"])
def test_show_of_something_else_has_its_header(tmp_path: Path, what: str) -> None:
    with FakeControl(make_instance(tmp_path), answers(show={} if what == "stats" else [])):
        done = run(tmp_path, "show", what)
    assert done.stdout.split() == list(tables.COLUMNS[what])


def ctrl_c_after(count: int) -> Callable[[float], None]:
    """A sleep that takes no time, and the last time is interrupted."""
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert seconds == 2.5
        if len(slept) == count:
            raise KeyboardInterrupt

    return sleep


def test_watch_repeats_until_ctrl_c_and_that_is_no_failure(tmp_path: Path) -> None:
    with FakeControl(make_instance(tmp_path), answers(show=[dict(PAIR)])) as control:
        done = run(tmp_path, "show", "--watch", "--interval", "2.5", sleep=ctrl_c_after(3))
    table = tables.render("pairs", [PAIR])
    assert (done.code, done.stdout) == (0, "\n".join([table] * 3))
    assert len(control.requests) == 3


def test_watch_as_json_is_one_line_per_look(tmp_path: Path) -> None:
    words = ["show", "--watch", "--json", "--interval", "2.5"]
    with FakeControl(make_instance(tmp_path), answers(show=[dict(PAIR)])):
        done = run(tmp_path, *words, sleep=ctrl_c_after(3))
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[PAIR]] * 3


def test_watch_draws_a_terminal_anew(tmp_path: Path) -> None:
    words = ["show", "--watch", "--interval", "2.5"]
    with FakeControl(make_instance(tmp_path), answers(show=[])):
        done = run(tmp_path, *words, sleep=ctrl_c_after(2), is_terminal=True)
    assert done.stdout.count("\x1b[H\x1b[2J") == 2


def test_show_of_a_killed_daemon_reads_what_it_left_in_the_kernel(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    instance.bpffs_dir.mkdir(parents=True)
    (instance.bpffs_dir / "show").write_text(tables.render("pairs", [PAIR]))
    done = run(tmp_path, "show")
    assert (done.code, done.stdout) == (3, tables.render("pairs", [PAIR]))
    assert "a daemon that is gone has left" in done.stderr
    rows = json.loads(run(tmp_path, "show", "--json").stdout)
    assert [(row["id"], row["up_bytes"], row["rule"]) for row in rows] == [(7, 1023, "named")]


def test_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    """`pyforwarder show | head -1` in a real pipe, whose reader is gone before we write."""
    with FakeControl(make_instance(tmp_path), answers(show=[dict(PAIR)])):
        import os

        from tests.helpers.fake_control import environ

        read_fd, write_fd = os.pipe()
        os.close(read_fd)
        done = subprocess.run(
            [sys.executable, "-m", "pyforwarder", "show"],
            env={**os.environ, **environ(tmp_path)},
            stdout=write_fd,
            stderr=subprocess.PIPE,
            timeout=scaled_s(30),
            check=False,
        )
        os.close(write_fd)
    assert (done.returncode, done.stderr) == (1, b"")


# ---------------------------------------------------------------------- flush, forward


def test_flush_prints_the_ids_that_were_reset(tmp_path: Path) -> None:
    result = {"flushed": [3, 5], "unknown": []}
    with FakeControl(make_instance(tmp_path), answers(flush=result)) as control:
        done = run(tmp_path, "flush", "3", "5")
    assert (done.code, done.stdout, done.stderr) == (0, "3\n5\n", "")
    assert control.requests == [{"do": "flush", "ids": [3, 5]}]


def test_flush_of_an_id_that_no_pair_has_fails_and_names_it(tmp_path: Path) -> None:
    result = {"flushed": [3], "unknown": [5, 6]}
    with FakeControl(make_instance(tmp_path), answers(flush=result)):
        done = run(tmp_path, "flush", "3", "5", "6")
    assert (done.code, done.stdout) == (1, "3\n")
    assert done.stderr == "pyforwarder: no such pair: 5 6\n"


def test_flush_of_what_is_no_id_says_where_ids_stand(tmp_path: Path) -> None:
    for text in ("abc", "1-3", "1,2", "all", "99999999999999999999"):
        done = run(tmp_path, "flush", text)
        assert (done.code, done.stdout) == (2, "")
        assert f"{text!r} is no id: write the numbers in the first column" in done.stderr
        assert ("or --all" in done.stderr) == (text == "all")


def test_check_dumps_what_it_accepts_again(tmp_path: Path) -> None:
    done = run(tmp_path, "check", "--dump")
    assert (done.code, done.stderr) == (0, "")
    assert "idle: 1h\n" in done.stdout
    file = tmp_path / "complete.yaml"
    file.write_text(done.stdout)
    assert run(tmp_path, "check", "--dump", str(file)).stdout == done.stdout


def test_check_tells_of_what_is_hardly_meant_and_says_ok(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    rules = "[{match: any, reject: close}, {match: ssh, to: 127.0.0.1:22}]"
    file.write_text(f"listeners: [{{bind: 127.0.0.1:1, rules: {rules}}}]\n")
    done = run(tmp_path, "check", str(file))
    assert (done.code, done.stdout) == (0, f"{file}: ok, 1 listener, 2 rules, 0 upstreams\n")
    assert done.stderr == (
        f"warning: {file}, line 1, listeners[0].rules[1]: is never reached: the rule 'any' takes "
        "everything\n"
    )


def test_flush_all_names_no_ids(tmp_path: Path) -> None:
    result: object = {"flushed": [], "unknown": []}
    with FakeControl(make_instance(tmp_path), answers(flush=result)) as control:
        assert run(tmp_path, "flush", "--all").code == 0
    assert control.requests == [{"do": "flush", "all": True}]


def test_forward_prints_the_new_pairs_id(tmp_path: Path) -> None:
    with FakeControl(make_instance(tmp_path), answers(forward={"id": 23})) as control:
        done = run(tmp_path, "forward", "4242", "7", "9")
    assert (done.code, done.stdout) == (0, "23\n")
    assert control.requests == [{"do": "forward", "pid": 4242, "fds": [7, 9]}]


# ---------------------------------------------------------------------- up


def test_up_hands_its_options_to_the_supervisor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyforwarder import supervisor

    asked: list[tuple[Environment, supervisor.UpOptions]] = []

    def fake_run(env: Environment, options: supervisor.UpOptions, ask: Any) -> int:
        asked.append((env, options))
        with pytest.raises(NotRunningError):  # the daemon that runs there
            ask("ping", ())
        return 1

    monkeypatch.setattr(supervisor, "run", fake_run)
    words = ["up", "-c", "f.yaml", "--listen", "[::1]:0", "--datapath", "copy", "--detach", "-vv"]
    assert run(tmp_path, *words, "--instance", "lab").code == 1
    assert run(tmp_path, "up").code == 1
    assert [options for _, options in asked] == [
        supervisor.UpOptions(
            instance="lab",
            config_path=Path("f.yaml"),
            listen="[::1]:0",
            datapath="copy",
            detach=True,
            verbosity=2,
        ),
        supervisor.UpOptions(
            instance="default",
            config_path=None,
            listen=None,
            datapath=None,
            detach=False,
            verbosity=0,
        ),
    ]
    assert asked[0][0].environ["PYFORWARDER_RUN_DIR"] == str(tmp_path / "run")


# ---------------------------------------------------------------------- reload, down


def test_reload_says_how_many_listeners_there_are_on_stderr(tmp_path: Path) -> None:
    with FakeControl(make_instance(tmp_path), answers(reload={"listeners": 1})):
        done = run(tmp_path, "reload")
    assert (done.code, done.stdout, done.stderr) == (0, "", "reloaded: 1 listener\n")


def test_reload_of_a_wrong_configuration_is_exit_code_2(tmp_path: Path) -> None:
    def refuse(*_: object) -> object:
        raise Refusal("f.yaml, line 3, log.level: no such level", kind="config", line=3)

    with FakeControl(make_instance(tmp_path), refuse):
        done = run(tmp_path, "reload")
    assert (done.code, done.stderr) == (
        2,
        "pyforwarder: f.yaml, line 3, log.level: no such level\n",
    )


def test_down_returns_once_the_daemon_has_let_go_of_its_lock(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    asked = threading.Event()

    def answer(request: Request, _fds: list[int]) -> object:
        asked.set()
        return {}

    control = FakeControl(instance, answer)
    ended: list[int] = []
    waiter = threading.Thread(target=lambda: ended.append(run(tmp_path, "down").code))
    waiter.start()
    assert asked.wait(15)
    assert ended == []  # it was answered, and still waits
    control.close()
    waiter.join(15)
    assert ended == [0]
    assert control.requests == [{"do": "down", "now": False}]


def test_down_waits_for_the_daemon_that_has_answered(tmp_path: Path) -> None:
    """Another one has taken its place between the look at the lock and the request."""
    instance = make_instance(tmp_path)
    control: FakeControl
    before: list[InstanceLock] = []

    def answer(request: Request, _fds: list[int]) -> object:
        before.append(InstanceLock(instance, os.dup(control.lock.fileno())))  # it drains on
        control.lock.renew()
        said = {"drain_s": 0.0, "lock": control.lock.identity}
        asked.set()
        return said

    asked = threading.Event()
    control = FakeControl(instance, answer)
    ended: list[int] = []
    waiter = threading.Thread(target=lambda: ended.append(run(tmp_path, "down").code))
    waiter.start()
    assert asked.wait(15)
    control.lock.remove()
    control.close()
    waiter.join(15)
    assert ended == [0]
    before[0].close()


def test_down_says_that_another_daemon_has_taken_the_place_of_the_one_that_ended(
    tmp_path: Path,
) -> None:
    instance = make_instance(tmp_path)
    control: FakeControl

    def answer(request: Request, _fds: list[int]) -> object:
        said = {"drain_s": 0.0, "lock": control.lock.identity}
        control.lock.renew()  # the next one has a file of its own, and the one before ends
        instance.pid_file.write_text("4321")
        return said

    with (control := FakeControl(instance, answer)):
        instance.pid_file.write_text("1234")
        done = run(tmp_path, "down")
    assert (done.code, done.stderr) == (
        0,
        "the daemon before (pid 1234) has ended; instance 'default' runs as pid 4321\n",
    )


@pytest.mark.parametrize(
    ("pairs", "said"), [(0, ""), (1, "; 1 pair reset"), (5, "; 5 pairs reset")]
)
def test_down_says_how_many_pairs_were_reset(tmp_path: Path, pairs: int, said: str) -> None:
    instance = make_instance(tmp_path)
    control: FakeControl

    def answer(request: Request, _fds: list[int]) -> object:
        control.lock.write_reset(pairs)
        control.lock.close()
        return {"drain_s": 0.0}

    with (control := FakeControl(instance, answer)):
        done = run(tmp_path, "down")
    assert (done.code, done.stderr) == (0, f"instance 'default' stopped{said}\n")


def test_down_now_asks_for_it(tmp_path: Path) -> None:
    instance = make_instance(tmp_path)
    control: FakeControl

    def answer(request: Request, _fds: list[int]) -> object:
        control.lock.close()  # a daemon that ends at once
        return {}

    with (control := FakeControl(instance, answer)):
        done = run(tmp_path, "down", "--now")
    assert (done.code, done.stderr) == (0, "instance 'default' stopped\n")
    assert control.requests == [{"do": "down", "now": True}]


# ---------------------------------------------------------------------- explain, check

CONFIG = """
listeners:
  - name: main
    bind: 127.0.0.1:9999
    rules:
      - {name: named, match: instruction, allow: [loopback]}
      - {name: mail, match: {regex: "^EHLO "}, to: "127.0.0.1:25"}
      - {name: rest, match: any, reject: reset}
  - {name: second, bind: "127.0.0.1:9998", rules: [{name: all, match: any, to: web}]}
upstreams:
  web: {servers: [127.0.0.1:80, 127.0.0.1:81]}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


def test_explain_resolves_no_name_whose_port_is_denied_anyway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getaddrinfo(*_: object, **__: object) -> list[object]:
        raise AssertionError("asked for")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    path = tmp_path / "config.yaml"
    path.write_text(
        "listeners: [{bind: '127.0.0.1:0', rules: [{match: instruction, allow: ['any:443']}]}]\n"
    )
    sent = instruction("x.example:80")
    result = explained(tmp_path, "-c", str(path), "--hex", sent.hex())
    assert (result["outcome"], result["allowed"]) == ("route", False)
    assert result["why"] == "x.example:80: allow does not list port 80"


_OBEYED = "\x1b]0;x\x07\x9b2J\x7f\u202e"
_HOSTILE_PACKETS = {
    "http": b"GET /%b HTTP/1.1\r\nHost: %b\r\n\r\n",
    "http_connect": b"CONNECT %b:80 HTTP/1.1\r\n%b\r\n\r\n",
    "instruction": b"30%b:80%b",
    "socks": b"\x04\x01\0\x50\0\0\0\1%b\0%b\0",
    "rdp": b"\x03\0\0\x40%bCookie: mstshash=%b\r\n",
    "xmpp": b"<stream:stream to='%b' from='%b'>",
    "bytes": b"%b%b",
}


@pytest.mark.parametrize("match", _HOSTILE_PACKETS)
@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_explain_shows_nothing_that_a_terminal_obeys(
    tmp_path: Path, match: str, encoding: str
) -> None:
    hostile = _OBEYED.encode(encoding, "ignore")
    file = tmp_path / "bytes"
    file.write_bytes(_HOSTILE_PACKETS[match].replace(b"%b", hostile))
    rule = {
        "bytes": "{match: {bytes: {prefix: 'x'}}, to: '127.0.0.1:1'}",
        "http": "{match: http, to: '127.0.0.1:1'}",
        "rdp": "{match: rdp, to: '127.0.0.1:1'}",
        "xmpp": "{match: xmpp, to: '127.0.0.1:1'}",
    }.get(match, f"{{match: {match}, allow: [any]}}")
    config = tmp_path / "config.yaml"
    config.write_text(f"listeners: [{{bind: '127.0.0.1:0', rules: [{rule}]}}]\n")
    for more in ((), ("--json",), ("--end", "eof")):
        done = run(tmp_path, "explain", "-c", str(config), "--file", str(file), *more)
        assert done.code == 0, done.stderr
        shown = done.stdout + done.stderr
        assert all(character == "\n" or " " <= character <= "~" for character in shown), shown


def explained(root_dir: Path, *words: str) -> dict[str, object]:
    done = run(root_dir, "explain", *words, "--json")
    assert (done.code, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


def test_explain_says_rule_bytes_destination_and_permission(tmp_path: Path, config: str) -> None:
    sent = b"18127.0.0.1:900102hello"
    done = run(tmp_path, "explain", "-c", config, "--hex", sent.hex(" "))
    assert (done.code, done.stderr) == (0, "")
    assert "rule named takes it after 18 of 23 bytes, to 127.0.0.1:9001" in done.stdout
    assert "\nallowed: " in done.stdout
    result = explained(tmp_path, "-c", config, "--hex", sent.hex())
    assert result["outcome"] == "route"
    assert (result["rule"], result["to"], result["allowed"]) == ("named", "127.0.0.1:9001", True)
    assert (result["after_bytes"], result["skip"], result["bytes"]) == (18, 18, 23)


@pytest.mark.parametrize(
    "instruction", [b"1610.0.0.1:80800", b"18127.0.0.1:999900", b"1511.0.0.1:8000"]
)
def test_explain_says_what_may_not_be_reached(
    tmp_path: Path, config: str, instruction: bytes
) -> None:
    """Not in `allow`, and the forwarder itself, which is in it."""
    result = explained(tmp_path, "-c", config, "--hex", instruction.hex())
    assert (result["outcome"], result["allowed"]) == ("route", False)


def test_explain_without_enough_bytes_says_so(tmp_path: Path, config: str) -> None:
    result = explained(tmp_path, "-c", config, "--hex", b"18127".hex())
    assert result["outcome"] == "need-more"
    ended = explained(tmp_path, "-c", config, "--hex", b"18127".hex(), "--end", "timeout")
    assert (ended["outcome"], ended["rule"]) == ("refuse", "rest")


def test_explain_of_a_later_rule_gives_every_earlier_ones_answer(
    tmp_path: Path, config: str
) -> None:
    result = explained(tmp_path, "-c", config, "--hex", b"EHLO example.com\r\n".hex(":"))
    assert (result["rule"], result["to"]) == ("mail", "127.0.0.1:25")
    rules = result["rules"]
    assert isinstance(rules, list)
    assert [(rule["rule"], rule["outcome"]) for rule in rules][:2] == [
        ("named", "no-match"),
        ("mail", "match"),
    ]


def test_explain_another_listener_from_a_file(tmp_path: Path, config: str) -> None:
    (tmp_path / "first").write_bytes(b"anything")
    words = ["-c", config, "--listener", "second", "--file", str(tmp_path / "first")]
    result = explained(tmp_path, *words)
    assert (result["listener"], result["rule"], result["to"]) == ("second", "all", "web")
    assert result["allowed"] is True


def test_explain_judges_by_the_running_instances_configuration(tmp_path: Path) -> None:
    answer = answers(config={"text": CONFIG, "source": "/etc/running.yaml"})
    with FakeControl(make_instance(tmp_path), answer):
        result = explained(tmp_path, "--hex", b"EHLO x".hex())
    assert (result["config"], result["rule"]) == ("/etc/running.yaml", "mail")


def test_explain_without_an_instance_judges_by_the_built_in_one(tmp_path: Path) -> None:
    result = explained(tmp_path, "--hex", b"18127.0.0.1:900102".hex())
    assert (result["config"], result["rule"]) == ("built-in", "instruction")


def test_explain_says_whether_the_kernel_could_decide_the_same(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        """
listeners:
  - name: web
    bind: 127.0.0.1:443
    rules:
      - {name: a, match: {tls: {sni: a.example.com}}, to: '127.0.0.1:4433'}
      - {name: b, match: {tls: {sni: b.example.com}}, to: 'b.example.com:443'}
      - {name: late, match: {regex: '^E'}, to: '127.0.0.1:25'}
"""
    )
    words = ("-c", str(path), "--hex")
    one = explained(tmp_path, *words, client_hello(b"a.example.com").hex())
    assert (one["decided"], one["in_kernel"]) == ("user", {"rule": "a", "why": ""})
    names = "userspace alone connects to names, unix sockets and link-local addresses"
    other = explained(tmp_path, *words, client_hello(b"b.example.com").hex())
    assert other["in_kernel"] == {"rule": None, "why": names}
    rules = other["rules"]
    assert isinstance(rules, list)
    assert [rule["userspace_only"] for rule in rules] == [
        "",
        names,
        "userspace alone matches a `regex`",
    ]
    said = run(tmp_path, "explain", *words, client_hello(b"a.example.com").hex()).stdout
    assert said.endswith("decided in userspace; the kernel could decide the same\n")
    said = run(tmp_path, "explain", *words, b"EHLO x".hex()).stdout
    assert said.endswith("the kernel could not: userspace alone matches a `regex`\n")
    # Asked to decide, it has the first, and what is not its is said.
    path.write_text("datapath: express\n" + path.read_text())
    for first in (b"EHLO x", client_hello(b"a.example.com")):
        said = run(tmp_path, "explain", *words, first.hex()).stdout
        assert said.endswith(f"the kernel decides by a, not by b: {names}\n")
        assert explained(tmp_path, *words, first.hex())["kernel_rules"] == ["a"]


def test_explain_of_a_listener_whose_port_the_kernel_chooses(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    rule = "{name: all, match: any, to: '127.0.0.1:1'}"
    path.write_text(f"listeners: [{{bind: ['127.0.0.1:0', 'unix:/x'], rules: [{rule}]}}]\n")
    result = explained(tmp_path, "-c", str(path), "--hex", "00", "--client", "192.0.2.1:5")
    assert result["in_kernel"] == {"rule": "all", "why": ""}


def test_explain_takes_datagrams(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        """
listeners:
  - {name: tcp, bind: '127.0.0.1:0', rules: [{match: any, reject: reset}]}
  - name: web
    bind: 127.0.0.1:443
    protocol: udp
    rules:
      - {name: q, match: {quic: {sni: '*.example.com'}}, to: '127.0.0.1:4433'}
      - {name: names, match: dns, to: '127.0.0.1:53'}
      - {name: rest, match: any, reject: close}
"""
    )
    first, second = split_hello(hello(size=1800), 1000)
    words = ("-c", str(path), "--udp", "--hex", first.hex())
    waits = explained(tmp_path, *words)
    assert (waits["outcome"], waits["listener"], waits["datagrams"]) == ("need-more", "web", 1)
    late = explained(tmp_path, *words, "--end", "timeout")
    assert (late["outcome"], late["rule"]) == ("refuse", "rest")
    whole = explained(tmp_path, *words, "--hex", second.hex(), "--hex", b"later".hex())
    assert (whole["outcome"], whole["rule"], whole["to"]) == ("route", "q", "127.0.0.1:4433")
    assert (whole["after_datagrams"], whole["datagrams"]) == (2, 3)
    assert whole["after_bytes"] == len(first) + len(second)
    (tmp_path / "1").write_bytes(first)
    (tmp_path / "2").write_bytes(second)
    files = ("--file", str(tmp_path / "1"), "--file", str(tmp_path / "2"))
    done = run(tmp_path, "explain", "-c", str(path), "--listener", "web", *files)
    assert "rule q takes it after 2400 of 2400 bytes (2 of 2 datagrams), to" in done.stdout
    assert "server name a.example.com, alpn h3, version 1" in done.stdout


def test_explain_of_datagrams_says_why_not(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    rules = "{match: {bytes: abcdef}, to: '127.0.0.1:1'}, {match: dns, to: '127.0.0.1:53'}"
    path.write_text(f"listeners: [{{bind: '127.0.0.1:0', protocol: udp, rules: [{rules}]}}]\n")
    result = explained(tmp_path, "-c", str(path), "--hex", b"abc".hex())
    assert (result["outcome"], result["rule"]) == ("refuse", "-")
    assert result["why"] == "no_match (no rule matches): no session"
    reports = result["rules"]
    assert isinstance(reports, list)
    assert {report["outcome"] for report in reports} == {"no-match"}
    assert {report["why"] for report in reports} == {
        "not what the datagram is, or where it comes from or goes to"
    }


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--udp",), "no listener says `protocol: udp`"),
        (("--udp", "--listener", "main"), "takes TCP"),
    ],
)
def test_explain_wants_a_listener_for_datagrams(
    tmp_path: Path, config: str, words: tuple[str, ...], says: str
) -> None:
    done = run(tmp_path, "explain", "-c", config, *words, "--hex", "00")
    assert done.code == 2
    assert says in done.stderr


def test_explain_reads_stdin(tmp_path: Path) -> None:
    done = run(tmp_path, "explain", "--file", "-", stdin=b"18127.0.0.1:900102")
    assert "to 127.0.0.1:9001" in done.stdout


def test_check_says_what_there_is(tmp_path: Path, config: str) -> None:
    done = run(tmp_path, "check", config)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout == f"{config}: ok, 2 listeners, 4 rules, 1 upstream\n"


def test_check_of_nothing_is_the_built_in_configuration(tmp_path: Path) -> None:
    assert run(tmp_path, "check").stdout == "built-in: ok, 1 listener, 1 rule, 0 upstreams\n"


def test_check_names_line_and_key(tmp_path: Path) -> None:
    text = CONFIG.replace("allow: [loopback]", "allow: [loopbck]")
    done = run(tmp_path, "check", "-", stdin=text.encode())
    assert (done.code, done.stdout) == (2, "")
    assert "stdin, line 6, listeners[0].rules[0].allow" in done.stderr


def test_check_finds_a_key_file_that_cannot_be_read(tmp_path: Path) -> None:
    text = "tokens: {keys: {ops: /nonexistent/ops.key}}"
    done = run(tmp_path, "check", "-", stdin=text.encode())
    assert done.code == 2
    assert done.stderr == (
        "pyforwarder: stdin, line 1, tokens.keys.ops: /nonexistent/ops.key: No such file or "
        "directory; make it with `pyforwarder token --new /nonexistent/ops.key`\n"
    )
    text = "log: {level: info}\nusers:\n  a.b: /nonexistent/alice\n"
    assert run(tmp_path, "check", "-", stdin=text.encode()).stderr == (
        "pyforwarder: stdin, line 3, users.a.b: /nonexistent/alice: No such file or "
        "directory; make it with `pyforwarder password > /nonexistent/alice`\n"
    )


@pytest.mark.parametrize(
    ("bind", "port", "reason"),
    [
        ("127.0.0.1:443", 443, ""),
        ("127.0.0.1:443", 80, "--port 80: main listens on 127.0.0.1:443"),
        ("127.0.0.1:8000-8003", 8003, ""),
        ("127.0.0.1:8000-8003", 8004, "--port 8004: main listens on 127.0.0.1:8000-8003"),
        ("unix:/run/x", 80, "--port 80: main listens on unix:/run/x"),
        ("127.0.0.1:0", 80, ""),  # the kernel may choose it
        ("systemd:web", 80, ""),
    ],
)
def test_explain_refuses_a_port_that_the_listener_has_not(
    tmp_path: Path, bind: str, port: int, reason: str
) -> None:
    (tmp_path / "c.yaml").write_text(
        f'listeners: [{{bind: "{bind}", rules: [{{match: any, to: "127.0.0.1:1"}}]}}]'
    )
    done = run(
        tmp_path, "explain", "-c", str(tmp_path / "c.yaml"), "--hex", "00", "--port", str(port)
    )
    assert (done.code, reason in done.stderr) == (2 if reason else 0, True)


# ---------------------------------------------------------------------- doctor, demo


@pytest.mark.parametrize("is_own", [False, True])
@pytest.mark.parametrize(("kind", "mark"), [("bpf", "ok "), ("sysfs", "   ")])
def test_doctor_finds_no_fault_in_a_bpffs_that_up_will_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mark: str, is_own: bool
) -> None:
    from pyforwarder.cli import doctor
    from pyforwarder.supervisor.files import bpffs

    point = tmp_path if is_own else Path("/sys/fs/bpf")
    root = tmp_path if is_own else point / "pyforwarder"
    monkeypatch.delenv("PYFORWARDER_BPFFS", raising=False)
    if is_own:
        monkeypatch.setenv("PYFORWARDER_BPFFS", str(root))
    monkeypatch.setattr(bpffs, "_mounts", lambda: [bpffs.Mount(point, kind, kind)])
    lines = doctor.Report(tuple(doctor._findings(None)), {}).as_text().splitlines()
    (line,) = [line for line in lines if line[4:].startswith("bpffs ")]
    assert line.startswith(mark)
    is_there = "a" if kind == "bpf" else "no"
    assert f" {is_there} BPF file system is mounted at {point}" in line
    assert f"stay in {root}" in line
    assert ("nothing is to be done" in line) is (kind != "bpf")


@pytest.mark.parametrize("lockdown", ["integrity", "confidentiality"])
@pytest.mark.parametrize(
    ("reads", "missing", "said"),
    [
        (True, (), "programs that see packets may read it"),
        (
            False,
            (),
            "programs that see packets may not read it: splice and express go without one check of "
            "packets of this host's guests (docs/security.md)",
        ),
        (False, (Capability.CAP_BPF,), "not known: CAP_BPF would be needed"),
    ],
)
def test_doctor_says_whether_a_check_of_guests_packets_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    lockdown: str,
    reads: bool,
    missing: tuple[Capability, ...],
    said: str,
) -> None:
    """By what programs may do here, whatever forbids it."""
    from pyforwarder.cli import doctor
    from pyforwarder.datapath.ebpf import probing
    from pyforwarder.runtime import host

    monkeypatch.setattr(host, "lockdown", lambda: host.Lockdown(lockdown))
    monkeypatch.setattr(probing, "reads_kernel", lambda: reads)
    monkeypatch.setattr(host, "missing_capabilities", lambda *_, **__: missing)
    lines = doctor.Report(tuple(doctor._findings(None)), {}).as_text().splitlines()
    (line,) = [line for line in lines if line[4:].startswith("kernel memory ")]
    assert line.startswith("   ")
    assert line[4:].removeprefix("kernel memory").strip() == said


@pytest.mark.parametrize("works", [True, False])
def test_doctor_fails_only_if_nothing_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    from pyforwarder.cli import doctor
    from pyforwarder.datapath.proof.selftest import Proof

    proof = Proof(works, "" if works else "no TCP here", {}, 0.5)
    report = doctor.Report((doctor.Finding("kernel", None, "6.1.0"),), {"copy": proof})
    monkeypatch.setattr(doctor, "run", lambda _stats: report)
    done = run(tmp_path, "doctor")
    assert (done.code, done.stdout) == (0 if works else 1, report.as_text())
    as_json = run(tmp_path, "doctor", "--json")
    assert as_json.code == done.code
    assert json.loads(as_json.stdout) == report.as_json()


def test_demos_exit_code_is_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyforwarder.cli import demo

    monkeypatch.setattr(demo, "run", lambda env: 1)
    assert run(tmp_path, "demo").code == 1


# ---------------------------------------------------------------------- token


def test_new_key_is_private_and_signs(tmp_path: Path) -> None:
    from pyforwarder.core import token

    key_file = tmp_path / "ops.key"
    assert run(tmp_path, "token", "--new", str(key_file)).code == 0
    assert key_file.stat().st_mode & 0o777 == 0o600
    done = run(tmp_path, "token", "10.0.0.5:22", "--key", str(key_file), "--expires", "300")
    assert (done.code, done.stdout, done.stderr) == (0, "", "")
    signed = token.read(done.raw)
    assert isinstance(signed, token.SignedInstruction)
    assert (signed.key_id, signed.expires_unix_s) == ("ops", int(UNIX_TIME_S) + 300)
    assert signed.length == len(done.raw)
    keys = token.TokenKeys({"ops": token.key_from_file(key_file.read_bytes())})
    assert keys.refusal(signed, client=None, now_unix_s=UNIX_TIME_S) is None


def test_key_may_have_another_id_than_its_file(tmp_path: Path) -> None:
    key_file = tmp_path / "k"
    key_file.write_bytes(b"0123456789abcdef")
    done = run(tmp_path, "token", "10.0.0.5:22", "--key", f"night={key_file}")
    assert b" key=night " in done.raw


def test_new_key_never_overwrites_one(tmp_path: Path) -> None:
    key_file = tmp_path / "ops.key"
    key_file.write_text("precious and long enough")
    done = run(tmp_path, "token", "--new", str(key_file))
    assert (done.code, key_file.read_text()) == (1, "precious and long enough")


def test_key_that_could_be_guessed_is_refused(tmp_path: Path) -> None:
    key_file = tmp_path / "ops.key"
    key_file.write_text("short\n")
    done = run(tmp_path, "token", "10.0.0.5:22", "--key", str(key_file))
    assert done.code == 2
    assert "at least 16 bytes" in done.stderr
