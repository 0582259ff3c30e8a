"""Files with keys and passwords: what is taken from them, and how a bad one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyforwarder.config import Config, parse_config
from pyforwarder.config.key_files import load_token_keys, read_keys, read_passwords
from pyforwarder.errors import ConfigError


def config(section: str) -> Config:
    return parse_config(section, source="test")


def test_keys_and_passwords_lose_one_final_newline(tmp_path: Path) -> None:
    (tmp_path / "ops").write_bytes(b"0123456789abcdef\n")
    (tmp_path / "alice").write_bytes(b"open sesame\n\n")
    assert read_keys(config(f"tokens: {{keys: {{ops: {tmp_path}/ops}}}}")) == {
        "ops": b"0123456789abcdef"
    }
    assert read_passwords(config(f"users: {{alice: {tmp_path}/alice}}")) == {
        "alice": b"open sesame\n"
    }


def test_without_files_there_is_nothing() -> None:
    assert read_keys(config("")) == {}
    assert read_passwords(config("")) == {}
    assert load_token_keys(config("")) is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        (b"", "1 to 255 bytes"),
        (b"\n", "1 to 255 bytes"),
        (b"x" * 256, "1 to 255 bytes"),
        (b"alice:$2y$05$" + b"x" * 53 + b"\n", "what stands behind its colon, the hash alone"),
        (b"alice:$argon2id$v=19$m=8,t=1,p=1$abc\n", "the hash alone"),
        (b"alice:$apr1$abc$def\n", "the hash alone"),
    ],
)
def test_a_password_that_cannot_be_used_is_named(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "alice").write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_passwords(config(f"users: {{alice: {tmp_path}/alice}}"))
    assert caught.value.path == "users.alice"


@pytest.mark.parametrize("password", [b"a:$2", b"a:$3$b", b"a b:$2y$", b":$2y$05$", b"$:$"])
def test_a_password_with_a_colon_is_one(tmp_path: Path, password: bytes) -> None:
    (tmp_path / "alice").write_bytes(password)
    assert read_passwords(config(f"users: {{alice: {tmp_path}/alice}}")) == {"alice": password}


def test_the_longest_password_is_taken(tmp_path: Path) -> None:
    (tmp_path / "alice").write_bytes(b"x" * 255 + b"\n")
    assert read_passwords(config(f"users: {{alice: {tmp_path}/alice}}")) == {"alice": b"x" * 255}


@pytest.mark.parametrize(("content", "reason"), [(None, "No such file"), (b"short\n", "16 bytes")])
def test_a_key_that_cannot_be_used_is_named(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "ops").write_bytes(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_keys(config(f"tokens: {{keys: {{ops: {tmp_path}/ops}}}}"))
    assert caught.value.path == "tokens.keys.ops"
