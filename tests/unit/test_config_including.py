"""`include:`: files of a directory, joined with the one that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyforwarder.config import Config, load_config, load_whole, parse_config
from pyforwarder.config.dump import dump_config
from pyforwarder.config.warnings import config_warnings
from pyforwarder.errors import ConfigError
from pyforwarder.supervisor import UpOptions
from pyforwarder.supervisor.configuration.in_force import ConfigSource, Shared

MAIN = """
include: conf.d
listeners: [{name: main, bind: 127.0.0.1:1, rules: [{match: any, to: web}]}]
upstreams: {web: {servers: [10.0.0.1:80]}}
"""
WEB = """# a web server
listeners:
- name: web
  bind: 127.0.0.1:2
  rules: [{match: any, to: more}]
upstreams:
  more: {servers: [10.0.0.2:80]}
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "conf.d").mkdir(mode=0o700)
    (tmp_path / "main.yaml").write_text(MAIN)
    return tmp_path


def load(directory: Path, **files: str) -> Config:
    for name, text in files.items():
        (directory / "conf.d" / f"{name}.yaml").write_text(text)
        (directory / "conf.d" / f"{name}.yaml").chmod(0o600)
    return load_config(directory / "main.yaml")


def error_of(directory: Path, **files: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(directory, **files)
    return caught.value


def test_listeners_and_upstreams_of_all_files_are_one_configuration(directory: Path) -> None:
    config = load(
        directory,
        b=WEB,
        a="listeners: [{bind: 127.0.0.1:3, rules: [{match: any, to: more}]}]",
        c="",
        d="# only words",
        e="listeners:\nupstreams:\n",
    )
    assert [listener.name for listener in config.listeners] == ["main", "main-2", "web"]
    assert list(config.upstreams) == ["web", "more"]


def test_other_files_of_the_directory_are_left_alone(directory: Path) -> None:
    for name in ("web.yaml~", ".web.yaml", "web.yaml.dpkg-old", "README"):
        (directory / "conf.d" / name).write_text("nonsense: [")
    (directory / "conf.d" / "web.yml").write_text(WEB)
    assert len(load(directory).listeners) == 2


def test_text_of_the_whole_says_the_same_and_includes_nothing(directory: Path) -> None:
    config = load(directory, web=WEB)
    whole = load_whole(directory / "main.yaml")
    again = parse_config(whole.text, source="whole")
    assert "include" not in whole.text
    assert dump_config(again) == dump_config(config)


def test_directories_may_be_several_and_absolute(directory: Path) -> None:
    other = directory / "other"
    other.mkdir()
    (other / "web.yaml").write_text(WEB)
    (directory / "main.yaml").write_text(MAIN.replace("conf.d", f"[conf.d, {other}]"))
    assert len(load(directory).listeners) == 2
    text = (directory / "main.yaml").read_text().replace("conf.d, ", "")
    assert len(parse_config(text, source="stdin").listeners) == 2


def test_fault_in_an_included_file_names_it(directory: Path) -> None:
    error = error_of(directory, web=WEB.replace("to: more", "too: more"))
    file = f"{directory}/conf.d/web.yaml"
    assert (error.source, error.line) == (file, 5)
    assert error.path == "listeners[0].rules[0].too"
    assert str(error).startswith(f"{file}, line 5, listeners[0].rules[0].too: unknown key")


def test_faults_of_several_files_are_told_with_their_files(directory: Path) -> None:
    (directory / "main.yaml").write_text(MAIN + "timeouts: {idle: 0}\n")
    error = error_of(directory, web=WEB.replace("127.0.0.1:2", "localhost:2"))
    assert error.source == f"{directory}/main.yaml"
    assert f"{directory}/conf.d/web.yaml, line 4, listeners[0].bind: " in str(error)


@pytest.mark.parametrize(
    ("more", "path", "words"),
    [
        ("listeners: [{name: main, bind: 127.0.0.1:9, rules: []}]", "listeners[0].name", "line 3"),
        ("upstreams: {web: {servers: [10.0.0.9:80]}}", "upstreams.web", "line 4"),
    ],
)
def test_name_that_stands_twice_is_an_error_that_names_both_files(
    directory: Path, more: str, path: str, words: str
) -> None:
    error = error_of(directory, more=more)
    assert (error.source, error.path) == (f"{directory}/conf.d/more.yaml", path)
    assert f"stands in {directory}/main.yaml, {words}, too" in str(error)


def test_two_included_files_cannot_have_the_same_name_either(directory: Path) -> None:
    error = error_of(directory, a=WEB, b=WEB)
    assert error.source == f"{directory}/conf.d/b.yaml"
    assert f"'web' stands in {directory}/conf.d/a.yaml, line 3, too" in str(error)


def test_address_that_is_bound_twice_names_the_second_file(directory: Path) -> None:
    error = error_of(directory, web=WEB.replace("127.0.0.1:2", "127.0.0.1:1"))
    assert error.source == f"{directory}/conf.d/web.yaml"
    assert "127.0.0.1:1 is bound by the listener 'main' already" in str(error)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("\ntimeouts: {idle: 1h}", 2, "`timeouts` cannot stand in an included file"),
        ("include: more.d", 1, "`include` cannot stand in an included file"),
        ("listener: []", 1, "did you mean 'listeners'?"),
        ("- listeners", 1, "must be keys and values (listeners, upstreams, users)"),
        ("listeners: {name: web}", 1, "must be a list, not a mapping"),
        ("upstreams: [web]", 1, "must be keys and values, not a list"),
        ("users: alice", 1, "must be keys and values, not 'alice'"),
        ("listeners: ]", 1, "not YAML"),
    ],
)
def test_what_an_included_file_cannot_have_is_told(
    directory: Path, text: str, line: int, words: str
) -> None:
    error = error_of(directory, more=text)
    assert (error.source, error.line) == (f"{directory}/conf.d/more.yaml", line)
    assert words in str(error)


@pytest.mark.parametrize(
    ("include", "words"),
    [
        ("nowhere.d", "No such file or directory"),
        ("main.yaml", "is a file: name its directory"),
        ("7", "write a directory, like /etc/pyforwarder/conf.d"),
        ("[conf.d, {}]", "write a directory, like /etc/pyforwarder/conf.d"),
        ("", "write a directory"),
    ],
)
def test_what_cannot_be_included_is_told(directory: Path, include: str, words: str) -> None:
    (directory / "main.yaml").write_text(MAIN.replace("conf.d", include))
    error = error_of(directory)
    assert (error.source, error.path, error.line) == (f"{directory}/main.yaml", "include", 2)
    assert words in str(error)


def test_text_without_a_file_has_no_relative_directory() -> None:
    with pytest.raises(ConfigError, match=r"is relative to no file: write /\.\.\."):
        parse_config(MAIN, source="stdin")


def test_warnings_name_the_file(directory: Path) -> None:
    load(
        directory,
        web=WEB.replace(
            "[{match: any, to: more}]", "[{match: any, to: more}, {match: ssh, to: more}]"
        ),
    )
    whole = load_whole(directory / "main.yaml")
    config = load_config(directory / "main.yaml")
    (warning,) = config_warnings(config, whole.document, source="main.yaml")
    assert warning.startswith(f"{directory}/conf.d/web.yaml, line 5, listeners[0].rules[1]: ")


def test_daemon_reads_the_directory_again_at_every_reload(directory: Path) -> None:
    options = UpOptions("default", directory / "main.yaml", None, None, False, 0)
    source = ConfigSource(options)
    assert len(source.read()[1].listeners) == 1
    (directory / "conf.d" / "web.yaml").write_text(
        WEB.replace("to: more}]", "to: more}, {match: ssh, to: more}]")
    )
    (directory / "conf.d" / "web.yaml").chmod(0o600)
    text, config = source.read()
    assert len(config.listeners) == 2
    (warning,) = source.warnings(text, config)
    assert warning.startswith(f"{directory}/conf.d/web.yaml, line 5, ")
    (directory / "conf.d" / "web.yaml").write_text("listeners: 7")
    with pytest.raises(ConfigError, match="must be a list, not 7"):
        source.read()


FLEET = "fleet: {endpoints: ['http://10.0.0.1:2379'], name: edge}\n"
# What the fleet has.
SHARED = """upstreams:
  theirs: {servers: [10.0.0.3:80]}
listeners:
- name: theirs
  bind: 127.0.0.1:3
  rules:
  - {match: any, to: theirs}
  - {match: ssh, to: theirs}
"""
WHY = "is never reached: the rule 'any' takes everything"


def doubtful(text: str) -> str:
    """The text, whose listener has a rule that is never reached."""
    return re.sub(
        r"\[\{match: any, to: (\w+)\}", r"[{match: any, to: \1}, {match: ssh, to: \1}", text
    )


def test_daemon_says_where_each_part_of_the_whole_stands(directory: Path) -> None:
    main, web = directory / "main.yaml", directory / "conf.d" / "web.yaml"
    main.write_text(FLEET + doubtful(MAIN))
    web.write_text(doubtful(WEB))
    web.chmod(0o600)
    source = ConfigSource(UpOptions("default", main, None, None, False, 0))
    mine = [
        f"{main}, line 4, listeners[0].rules[1]: {WHY}",
        f"{web}, line 5, listeners[0].rules[1]: {WHY}",
    ]
    text, config = source.read()
    assert source.warnings(text, config) == mine
    theirs = f"fleet edge, edition 7, line 8, listeners[0].rules[1]: {WHY}"
    text, config = source.joined(source.read_own(), Shared("edge", 7, SHARED))
    assert source.warnings(text, config) == [*mine, theirs]
    # What another fleet has is none of this machine's.
    text, config = source.joined(source.read_own(), Shared("other", 7, SHARED))
    assert source.warnings(text, config) == mine


def test_lines_of_what_is_in_force_are_known_after_another_file_was_refused(
    directory: Path,
) -> None:
    main = directory / "main.yaml"
    main.write_text(FLEET + doubtful(MAIN))
    source = ConfigSource(UpOptions("default", main, None, None, False, 0))
    source.own = source.read_own()
    main.write_text(FLEET + "# moves all lines\n" + MAIN)
    source.read()  # and it is not taken
    text, config = source.joined(source.own, Shared("edge", 7, SHARED))
    assert source.warnings(text, config) == [
        f"{main}, line 4, listeners[0].rules[1]: {WHY}",
        f"fleet edge, edition 7, line 8, listeners[0].rules[1]: {WHY}",
    ]


@pytest.mark.parametrize("registered", [False, True])
def test_a_machine_whose_listeners_are_all_the_fleet_s_says_their_lines(
    tmp_path: Path, registered: bool
) -> None:
    main = tmp_path / "main.yaml"
    main.write_text(FLEET + "user: nobody-of-this-name\n")
    text = SHARED.replace("{servers", "{registered: [10.0.0.0/8], servers")
    servers = {"theirs": {"10.0.0.9:80": 1}} if registered else {}
    source = ConfigSource(UpOptions("default", main, None, None, False, 0))
    whole, config = source.joined(source.read_own(), Shared("edge", 7, text, servers))
    assert len(config.upstreams["theirs"].servers) == 1 + registered
    first, second = source.warnings(whole, config)
    assert first == f"fleet edge, edition 7, line 8, listeners[0].rules[1]: {WHY}"
    assert second.startswith(f"{main}, line 2, user: no user")


def test_directory_or_file_that_others_may_write_is_told_of(directory: Path) -> None:
    load(directory, web=WEB)
    whole = load_whole(directory / "main.yaml")
    config = load_config(directory / "main.yaml")
    for path, mode in ((directory / "conf.d", 0o775), (directory / "conf.d" / "web.yaml", 0o646)):
        path.chmod(0o700)
        assert config_warnings(config, whole.document, source="main.yaml") == []
        path.chmod(mode)
        (warning,) = config_warnings(config, whole.document, source="main.yaml")
        said = f"{path}: others may write it (mode {mode:04o}): chmod go-w {path}"
        assert warning == said
        path.chmod(0o700)
