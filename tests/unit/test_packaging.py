"""What is shipped beside the program is well-formed and agrees with it and with itself."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any, Final

import kubernetes_validate
import pytest
import yaml

import pyforwarder
from pyforwarder.config import load_config, parse_config
from pyforwarder.runtime.slowness import scaled_s

ROOT: Final = Path(__file__).parents[2]
PACKAGING: Final = ROOT / "packaging"
UNIT: Final = PACKAGING / "systemd" / "pyforwarder@.service"
# `forward` looks into other processes of the host, which a container does not see.
ONLY_ON_THE_HOST: Final = {"SYS_PTRACE"}


def _daemonset() -> dict[str, Any]:
    documents = yaml.safe_load_all((PACKAGING / "kubernetes" / "daemonset.yaml").read_text())
    return next(document for document in documents if document["kind"] == "DaemonSet")


def _compose_service() -> dict[str, Any]:
    compose = yaml.safe_load((PACKAGING / "container" / "compose.yaml").read_text())
    service: dict[str, Any] = compose["services"]["pyforwarder"]
    return service


def _unit_capabilities() -> set[str]:
    line = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert line is not None
    return {name.removeprefix("CAP_") for name in line[1].split()}


def test_kubernetes_objects_fit_the_schema_strictly() -> None:
    documents = list(yaml.safe_load_all((PACKAGING / "kubernetes" / "daemonset.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Namespace", "ConfigMap", "DaemonSet"]
    for document in documents:
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_a_kubernetes_object_with_an_unknown_key_is_refused() -> None:
    daemonset = _daemonset()
    daemonset["spec"]["template"]["spec"]["hostNetworks"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(daemonset, "1.31", strict=True)


def test_containers_get_the_capabilities_of_the_unit() -> None:
    container = _daemonset()["spec"]["template"]["spec"]["containers"][0]
    expected = _unit_capabilities() - ONLY_ON_THE_HOST
    assert set(container["securityContext"]["capabilities"]["add"]) == expected
    assert set(_compose_service()["cap_add"]) == expected


def test_everything_that_stops_a_daemon_waits_longer_than_it_drains() -> None:
    drain_s = parse_config("", source="nothing").timeouts.drain_s
    unit_s = re.search(r"^TimeoutStopSec=(\d+)s$", UNIT.read_text(), re.MULTILINE)
    assert unit_s is not None
    assert int(unit_s[1]) > drain_s
    assert _daemonset()["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > drain_s
    assert int(_compose_service()["stop_grace_period"].removesuffix("s")) > drain_s


def test_the_shipped_configuration_is_the_built_in_one() -> None:
    assert load_config(PACKAGING / "default.yaml").listeners == load_config(None).listeners


def test_the_kubernetes_configuration_is_valid() -> None:
    documents = yaml.safe_load_all((PACKAGING / "kubernetes" / "daemonset.yaml").read_text())
    config_map = next(document for document in documents if document["kind"] == "ConfigMap")
    config = parse_config(config_map["data"]["pyforwarder.yaml"], source="ConfigMap")
    assert config.listeners == load_config(None).listeners


@pytest.fixture
def unit_to_verify(tmp_path: Path) -> Path:
    """The unit as systemd-analyze can verify it here: with a program that exists."""
    text = UNIT.read_text().replace("/usr/local/bin/pyforwarder", "/bin/true")
    # The manual page is not installed here.
    text = re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE)
    path = tmp_path / UNIT.name
    path.write_text(text)
    return path


def test_systemd_finds_no_fault_in_the_unit(unit_to_verify: Path) -> None:
    verdict = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit_to_verify],
        capture_output=True,
        text=True,
        timeout=scaled_s(30),
        check=False,
    )
    assert (verdict.returncode, verdict.stdout + verdict.stderr) == (0, "")


def test_systemd_finds_no_fault_in_the_example_of_sockets(unit_to_verify: Path) -> None:
    path = unit_to_verify.with_name("pyforwarder@web.socket")
    text = (PACKAGING / "systemd" / "pyforwarder@.socket").read_text()
    path.write_text(text)
    assert "FileDescriptorName=web\n" in text
    assert "systemd:web" in text
    verdict = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path],
        capture_output=True,
        text=True,
        timeout=scaled_s(30),
        check=False,
    )
    assert (verdict.returncode, verdict.stdout + verdict.stderr) == (0, "")


def test_the_unit_stays_as_hardened_as_it_is(unit_to_verify: Path) -> None:
    """3.4 of 10 when this was written; 9.6 is a unit that says nothing."""
    verdict = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=35"),
            unit_to_verify,
        ],
        capture_output=True,
        text=True,
        timeout=scaled_s(30),
        check=False,
    )
    assert "Overall exposure level" in verdict.stdout
    assert verdict.returncode == 0, verdict.stdout


def test_the_version_is_said_in_one_place_only() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"{pyforwarder.__version__}"' not in pyproject
    changelog = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == pyforwarder.__version__


@pytest.mark.parametrize(
    "script",
    [
        *("run", "test", "check", "fix", "prepare", "install"),
        *("container/build", "container/sources", "container/test", "kernels/run"),
        *("kernels/guest/init", "kernels/guest/initrd", "kernels/guest/job", "../.ci/run"),
        *("documents/run", "release/run", "../packaging/debian/postinst"),
        *("../packaging/debian/prerm", "../packaging/debian/postrm"),
    ],
)
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = ROOT / "scripts" / script
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", path], timeout=scaled_s(10), check=True)
