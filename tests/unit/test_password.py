"""Passwords kept as hashes, and who verifies them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import bcrypt
import pytest

from pyforwarder.config import parse_config
from pyforwarder.config.key_files import read_passwords
from pyforwarder.core import password
from pyforwarder.core.explaining import explain
from pyforwarder.core.routing import End, Refuse, Route
from pyforwarder.core.rule_compiling import compile_rules
from pyforwarder.errors import ConfigError
from pyforwarder.runtime.loop import Loop
from pyforwarder.runtime.password_checks import (
    MOST,
    MOST_OF_CLIENT,
    Check,
    PasswordChecks,
)
from tests.helpers.command import run

# Of `secret`. Not made here: each process would have another, and other names of tests.
BCRYPT = b"$2b$04$kfF8zYgdXaUPJlhdVFKkpeFuj16lmLlrUH/ScSrsxGHdRvKUs9Itm"
# `htpasswd -nbB`, and the command `argon2`.
HTPASSWD = BCRYPT.replace(b"$2b$", b"$2y$")
ARGON2 = (
    b"$argon2id$v=19$m=19456,t=2,p=1$ajeiRDafI0dJ4FM/BYu"
    b"0zQ$A2DxvTeX8DT5zT2teVfK3VYXDq6IAVImvA/tc8I+qjY"
)
DEADLINE_S = 10.0


@pytest.mark.parametrize("stored", [BCRYPT, HTPASSWD, ARGON2], ids=["2b", "2y", "argon2id"])
def test_password_of_a_hash_is_right_and_no_other(stored: bytes) -> None:
    assert password.is_hash(stored)
    assert password.fault(stored) == ""
    assert password.verify(stored, b"secret")
    for wrong in (b"", b"secre", b"secrets", b"secret\0", stored):
        assert not password.verify(stored, wrong)


def test_bcrypt_looks_at_72_bytes() -> None:
    stored = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4))
    assert password.verify(stored, b"x" * 255)
    assert not password.verify(stored, b"x" * 71)


@pytest.mark.parametrize("plain", [b"secret", b"$ecret", b"$100", b"pa$$word$", b"$A$b", b""])
def test_password_as_it_is_is_no_hash(plain: bytes) -> None:
    assert not password.is_hash(plain)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (b"$6$salt$xyz", "a hash by $6$ is not verified here, but $2b$ and $argon2id$ are"),
        (b"$y$j9T$salt$xyz", "a hash by $y$ is not verified here"),
        (b"$apr1$salt$xyz", "make one with `pyforwarder password`"),
        (BCRYPT[:-1], "an incomplete hash"),
        (BCRYPT.replace(b"$04$", b"$31$"), "bcrypt of 31 rounds takes too long (4 to 15)"),
        (ARGON2.replace(b"m=19456", b"m=4194304"), "Argon2 may have 256 MiB and 16 lanes at most"),
        (ARGON2.replace(b"p=1", b"p=64"), "Argon2 may have 256 MiB and 16 lanes at most"),
        (ARGON2.replace(b"t=2", b"t=9999"), "Argon2 may have 32 passes at most"),
        (ARGON2.replace(b"v=19", b"v=16"), "an incomplete hash"),
    ],
)
def test_hash_that_cannot_be_used_is_an_error_that_says_what_to_write(
    tmp_path: Path, stored: bytes, words: str
) -> None:
    file = tmp_path / "alice"
    file.write_bytes(stored + b"\n")
    with pytest.raises(ConfigError) as caught:
        read_passwords(parse_config(f"users: {{alice: {file}}}", source="test"))
    assert words in str(caught.value)
    assert caught.value.path == "users.alice"


RULES = "listeners: [{bind: 127.0.0.1:1, rules: [{match: %s, allow: [any], users: [alice]}]}]\n"


@pytest.mark.parametrize("stored", [BCRYPT, ARGON2, b"secret"], ids=["bcrypt", "argon2", "plain"])
@pytest.mark.parametrize(
    ("said", "is_right"), [("YWxpY2U6c2VjcmV0", True), ("Ym9iOnNlY3JldA==", False)]
)
def test_explain_verifies_and_no_other_user_has_that_password(
    stored: bytes, said: str, is_right: bool
) -> None:
    config = parse_config(RULES % "http_connect" + "users: {alice: /x}", source="test")
    rules = compile_rules(config.listeners[0], passwords={"alice": stored})
    head = f"CONNECT 192.0.2.1:80 HTTP/1.1\r\nProxy-Authorization: Basic {said}\r\n\r\n"
    decision = explain(rules, head.encode(), end=End.OPEN).decision
    assert isinstance(decision, Route if is_right else Refuse)


class Slow:
    """Verifies when it is told to, and notes in which order."""

    def __init__(self) -> None:
        self.allowed = threading.Semaphore(0)
        self.seen: list[bytes] = []

    def verify(self, stored: bytes, said: bytes) -> bool:
        assert self.allowed.acquire(timeout=DEADLINE_S)
        self.seen.append(said)
        if said == b"raise":
            raise RuntimeError("a fault of the library")
        return stored == said


class Scene:
    def __init__(self) -> None:
        self.loop = Loop()
        self.slow = Slow()
        self.checks = PasswordChecks(self.loop, verify=self.slow.verify)
        self.answers: list[tuple[bytes, bool]] = []

    def ask(self, said: bytes, client: str = "a", stored: bytes = b"right") -> Check | bool | None:
        return self.checks.ask(
            stored, said, client=client, answer=lambda ok: self.answers.append((said, ok))
        )

    def run_until(self, look: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while not look():
            assert time.monotonic() < deadline_s
            self.loop.run_once(0.05)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    for _ in range(2 * MOST):
        made.slow.allowed.release()
    made.loop.dispose()


def test_answers_come_on_the_loop_and_right_ones_are_remembered(scene: Scene) -> None:
    assert isinstance(scene.ask(b"wrong"), Check)
    assert isinstance(scene.ask(b"right"), Check)
    assert scene.answers == []
    for _ in range(2):
        scene.slow.allowed.release()
    scene.run_until(lambda: len(scene.answers) == 2)
    assert scene.answers == [(b"wrong", False), (b"right", True)]
    assert scene.ask(b"right", client="b") is True
    assert isinstance(scene.ask(b"right", stored=b"another"), Check)
    assert isinstance(scene.ask(b"wrong"), Check)


def test_fault_of_the_library_is_no_right_password(scene: Scene) -> None:
    scene.ask(b"raise", stored=b"raise")
    scene.ask(b"right")
    for _ in range(2):
        scene.slow.allowed.release()
    scene.run_until(lambda: len(scene.answers) == 2)
    assert scene.answers == [(b"raise", False), (b"right", True)]


def test_clients_take_turns_however_much_one_asks(scene: Scene) -> None:
    for number in range(5):
        scene.ask(b"a%d" % number, client="a")
    scene.ask(b"b0", client="b")
    scene.ask(b"b1", client="b")
    for _ in range(7):
        scene.slow.allowed.release()
    scene.run_until(lambda: len(scene.answers) == 7)
    # The thread may have taken the first one or two before the other client came.
    assert scene.slow.seen.index(b"b1") < scene.slow.seen.index(b"a4")
    assert scene.slow.seen.index(b"b0") < scene.slow.seen.index(b"a3")


def test_what_waits_is_bounded_for_each_client_and_for_all(scene: Scene) -> None:
    for number in range(MOST):
        assert scene.ask(b"%d" % number, client=f"c{number // MOST_OF_CLIENT}") is not None
    assert scene.ask(b"more", client="c0") is None
    assert scene.ask(b"more", client="another") is None
    for _ in range(MOST):
        scene.slow.allowed.release()
    scene.run_until(lambda: len(scene.answers) == MOST)
    assert all(scene.ask(b"x%d" % n, client="c0") is not None for n in range(MOST_OF_CLIENT))
    assert scene.ask(b"more", client="c0") is None
    assert scene.ask(b"more", client="c1") is not None


def test_a_check_that_was_stopped_is_told_nothing(scene: Scene) -> None:
    check = scene.ask(b"right")
    assert isinstance(check, Check)
    check.stop()
    scene.ask(b"other")
    for _ in range(2):
        scene.slow.allowed.release()
    scene.run_until(lambda: bool(scene.answers))
    assert scene.answers == [(b"other", False)]


@pytest.mark.parametrize("line", [b"secret", b"secret\n", b"secret\nand more"])
def test_command_prints_a_hash_of_one_line(tmp_path: Path, line: bytes) -> None:
    done = run(tmp_path, "password", stdin=line)
    assert (done.code, done.stderr) == (0, "")
    stored = done.stdout.removesuffix("\n").encode()
    assert password.fault(stored) == ""
    assert password.verify(stored, b"secret")


@pytest.mark.parametrize("line", [b"", b"\n", b"x" * 256])
def test_command_wants_a_password_that_a_client_can_say(tmp_path: Path, line: bytes) -> None:
    done = run(tmp_path, "password", stdin=line)
    assert (done.code, done.stdout) == (2, "")
    assert "1 to 255 bytes" in done.stderr
