"""The reference of the configuration is complete, and what it says of each key is true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from pyforwarder.cli.configuration_manual import configuration_page
from pyforwarder.config import described, parse_config, reference
from pyforwarder.config.model import Config
from pyforwarder.config.section import Section
from pyforwarder.core.first_packet.table import PROTOCOLS
from pyforwarder.runtime.slowness import scaled_s

BLOCKS = {block.model: block for block in reference.blocks()}


def every_section(section: type[Section] = Section) -> list[type[Section]]:
    below = [each for kind in section.__subclasses__() for each in every_section(kind)]
    return below if section is Section else [*below, section]


@pytest.mark.parametrize("section", every_section(), ids=lambda section: section.__name__)
def test_every_key_of_every_block_is_in_the_reference(section: type[Section]) -> None:
    keys = [field.alias or name for name, field in section.model_fields.items()]
    assert [key.name for key in BLOCKS[section.__name__].keys] == keys


@pytest.mark.parametrize("block", BLOCKS.values(), ids=lambda block: str(block.model))
def test_every_key_says_what_it_means_and_how_it_is_written(block: reference.Block) -> None:
    for key in block.keys:
        assert re.fullmatch(r"[A-Z`].*[.)]", key.meaning), key.name
        assert list(key.kinds()), key.name
        assert key.values != "number", key.name  # without a range
        assert bool(key.block) == (key.values in ("block", "blocks by name", "list of blocks"))


@pytest.mark.parametrize("block", BLOCKS.values(), ids=lambda block: str(block.model))
def test_blocks_are_found_at_their_paths(block: reference.Block) -> None:
    for path in block.paths:
        above, _, name = path.rpartition(".")
        if path:
            holders = [each for each in BLOCKS.values() if above in each.paths]
            if name == "NAME":  # `upstreams.NAME` stands under `upstreams`
                assert path in {key.block for each in BLOCKS.values() for key in each.keys}
            else:
                assert path in {key.block for holder in holders for key in holder.keys}


def test_defaults_are_those_in_force() -> None:
    text = "".join(f"{key.name}: {key.default}\n" for key in BLOCKS["Config"].keys if key.default)
    assert parse_config(text, source="defaults") == parse_config("", source="nothing")
    (handover,) = [block for block in BLOCKS.values() if block.paths == ("handover",)]
    written = {key.name: yaml.safe_load(key.default) for key in handover.keys if key.default}
    assert parse_config(yaml.dump({"handover": written}), source="x").handover.after_s == 1.0
    assert written["after_bytes"] == "256KiB"


def test_a_key_without_a_meaning_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "_meanings", lambda _: {})
    with pytest.raises(reference.UndocumentedError, match=r"Config\.\w+: write below"):
        reference.blocks.__wrapped__()


def test_a_kind_that_nobody_explains_is_an_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(reference.KINDS, "list of names")
    with pytest.raises(reference.UndocumentedError, match=r"'list of names' is not in .*KINDS"):
        reference.blocks.__wrapped__()


def test_every_word_of_match_is_described() -> None:
    found = {word.name: word for word in described.words()}
    assert list(found) == list(PROTOCOLS)
    assert found["tls"].options == ("sni", "alpn", "version")
    assert found["tls"].summary == "A TLS ClientHello, and what it says in the clear."
    assert found["smtp"].described_as == "silence"
    assert {"instruction", "http_connect", "socks"} <= {
        name for name, word in found.items() if word.names_destination
    }
    assert not found["ssh"].names_destination
    assert all(word.summary.endswith((".", ")")) for word in found.values())


@pytest.mark.parametrize("word", described.words(), ids=lambda word: str(word.name))
def test_every_option_of_a_protocol_is_shown_in_its_description(word: described.Word) -> None:
    for option in word.options:
        if (word.name, option) not in {("regex", "pattern")}:  # mostly written short
            assert re.search(rf"\b{option}\b", word.about)


def test_the_manual_page_has_every_key_and_word() -> None:
    page = configuration_page().replace(r"\-", "-")
    for block in BLOCKS.values():
        for key in block.keys:
            assert f".TP\n\\fB{key.name}\\fR\n" in page
    for name in PROTOCOLS:
        assert f".TP\n\\fB{name}\\fR\n" in page
    assert "`" not in page


def test_groff_finds_no_fault_in_the_manual_page(tmp_path: Path) -> None:
    page = tmp_path / "pyforwarder.yaml.5"
    page.write_text(configuration_page())
    requests = re.findall(r"^[.'](\S*)", page.read_text(), re.MULTILINE)
    assert set(requests) == {"TH", "SH", "SS", "TP", "nf", "fi"}
    try:
        said = subprocess.run(
            ["groff", "-man", "-ww", "-z", page],
            capture_output=True,
            text=True,
            timeout=scaled_s(30),
            check=True,
        )
    except FileNotFoundError:
        return  # the requests above are all that can be looked at here
    assert said.stderr == ""


def test_the_example_of_the_manual_page_is_a_configuration() -> None:
    example = configuration_page().partition(".SH EXAMPLE\n.nf\n")[2].partition(".fi")[0]
    config = parse_config(example.replace(r"\-", "-"), source="pyforwarder.yaml(5)")
    assert isinstance(config, Config)
    assert set(config.upstreams) == {"web"}
