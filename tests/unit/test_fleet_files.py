"""The files that `fleet` names: what can be used, and what is said of the rest."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pyforwarder.config import Fleet
from pyforwarder.errors import ConfigError
from pyforwarder.fleet.files import Credentials, read_files


def make_certificate(directory: Path, name: str, *more: str) -> tuple[Path, Path]:
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-days", "2", "-subj", f"/O={name}"),
            *("-keyout", str(key), "-out", str(certificate), *(more or ("-nodes",))),
        ],
        capture_output=True,
        check=True,
    )
    return certificate, key


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates and keys, good and bad."""
    place = tmp_path_factory.mktemp("files")
    make_certificate(place, "good")
    make_certificate(place, "other")
    make_certificate(place, "secret", "-passout", "pass:secret")
    (place / "empty").write_text("")
    (place / "broken.pem").write_text(
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )
    (place / "broken.key").write_text(
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    )
    (place / "binary").write_bytes(b"\xff\xfe")
    (place / "long").write_bytes(b"x" * ((1 << 20) + 1))
    (place / "password").write_text("open sesame\n")
    (place / "lines").write_text("open\nsesame\n")
    os.mkfifo(place / "fifo")
    return place


def fleet(place: Path, *, ca: str, cert: str = "", key: str = "", password: str = "") -> Fleet:
    tls = {"ca": str(place / ca)}
    if cert:
        tls |= {"cert": str(place / cert), "key": str(place / key)}
    named: dict[str, object] = {"endpoints": ["https://127.0.0.1:1"], "name": "edge", "tls": tls}
    if password:
        named |= {"user": "ann", "password": str(place / password)}
    return Fleet.model_validate(named)


def test_what_can_be_used_is_read_and_nothing_else_is_believed(place: Path) -> None:
    files = read_files(fleet(place, ca="good.pem"))
    assert files.credentials is None
    assert files.context is not None
    assert files.context.check_hostname
    assert files.context.cert_store_stats()["x509"] == 1
    whole = fleet(place, ca="other.pem", cert="good.pem", key="good.key", password="password")
    assert read_files(whole).credentials == Credentials("ann", "open sesame")
    assert read_files(
        Fleet.model_validate({"endpoints": ["http://127.0.0.1:1"], "name": "edge"})
    ) == (None, None)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"ca": "absent"}, "fleet.tls.ca: .*absent: No such file or directory"),
        ({"ca": "empty"}, "fleet.tls.ca: .*empty: no certificate in PEM that can be read"),
        ({"ca": "good.key"}, "fleet.tls.ca: .*good.key: no certificate in PEM"),
        ({"ca": "broken.pem"}, "fleet.tls.ca: .*broken.pem: no certificate in PEM"),
        ({"ca": "binary"}, "fleet.tls.ca: .*binary: not UTF-8"),
        ({"ca": "long"}, "fleet.tls.ca: .*long: longer than 1048576 bytes"),
        ({"ca": "fifo"}, "fleet.tls.ca: .*fifo: no file"),
        ({"ca": "."}, "fleet.tls.ca: .*: (no file|Is a directory)"),
        ({"cert": "good.key", "key": "good.key"}, "fleet.tls.cert: .*good.key: no certificate"),
        ({"cert": "good.pem", "key": "good.pem"}, "fleet.tls.key: .*good.pem: no private key"),
        ({"cert": "good.pem", "key": "empty"}, "fleet.tls.key: .*empty: no private key in PEM"),
        ({"cert": "good.pem", "key": "other.key"}, "fleet.tls.key: .*is not the key of .*good"),
        ({"cert": "secret.pem", "key": "secret.key"}, "fleet.tls.key: .*has a passphrase"),
        ({"cert": "broken.pem", "key": "good.key"}, "fleet.tls.key: .*good.key, .*broken.pem: "),
        ({"cert": "good.pem", "key": "broken.key"}, "fleet.tls.key: .*broken.key, .*good.pem: "),
        ({"password": "absent"}, "fleet.password: .*absent: No such file"),
        ({"password": "empty"}, "fleet.password: .*empty: is empty"),
        ({"password": "lines"}, "fleet.password: .*lines: has several lines"),
        ({"password": "binary"}, "fleet.password: .*binary: not UTF-8"),
    ],
)
def test_what_cannot_be_used_is_told_of(place: Path, names: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_files(fleet(place, **{"ca": "good.pem", **names}))
