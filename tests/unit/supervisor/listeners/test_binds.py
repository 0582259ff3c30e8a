"""Where a listener binds: lists, ranges, both families, zones, and servers at the same port."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pyforwarder.config import Config, parse_config
from pyforwarder.config.dump import dump_config
from pyforwarder.core.address import (
    Address,
    AddressError,
    HostPort,
    PortRange,
    SamePort,
    SystemdSockets,
    UnixAddress,
    bind_text,
    parse_bind_entry,
    parse_configured_server,
    parse_destination,
)
from pyforwarder.errors import ConfigError, ForwarderError
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.runtime.sockaddr import sockaddr
from pyforwarder.supervisor.listeners.activation import Activation, usable_address
from pyforwarder.supervisor.listeners.binding import Listeners


def config_of(listener: str, more: str = "") -> Config:
    return parse_config(f"listeners:\n- {{{listener}}}\n{more}", source="test")


def error_of(listener: str, more: str = "") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config_of(listener, more)
    return caught.value


RULES = "rules: [{match: any, to: 10.0.0.1:80}]"


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("127.0.0.1:80", Address("127.0.0.1", 80)),
        ("127.0.0.1:9200-9210", PortRange("127.0.0.1", 9200, 9210)),
        ("[::1]:1-65535", PortRange("::1", 1, 65535)),
        ("unix:/run/x:1-2", UnixAddress("/run/x:1-2")),
        ("systemd:web", SystemdSockets("web")),
        ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80)),
        ("[FE80:0::1%br-lan.5]:0", Address("fe80::1%br-lan.5", 0)),
        ("[fe80::1%3]:8000-8001", PortRange("fe80::1%3", 8000, 8001)),
    ],
)
def test_entry_of_bind_is_read_and_written_alike(text: str, entry: object) -> None:
    assert parse_bind_entry(text) == entry
    assert parse_bind_entry(str(entry)) == entry


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("127.0.0.1:9210-9200", "a range of ports goes upwards, like 127.0.0.1:9200-9210"),
        ("127.0.0.1:9200-9200", "a range of ports goes upwards"),
        ("127.0.0.1:0-9", "a range of ports goes upwards"),
        ("127.0.0.1:1-70000", "port 70000 is out of range"),
        ("web:80-90", "a listener binds an IP address, not a name"),
        ("systemd:", "write systemd:NAME"),
        ("systemd", "write systemd:NAME"),
        ("127.0.0.1:80-", "write a range of ports as 127.0.0.1:80-PORT"),
        ("[::1]:80..90", "write a range of ports as [::1]:80-90"),
        ("127.0.0.1:80 - 90", "write a range of ports as 127.0.0.1:80-90"),
        ("10.0.0.9:80,443", "in a list, like [10.0.0.9:80, 10.0.0.9:443]"),
        ("9200-9210", "write 127.0.0.1:9200-9210 for this host"),
        ("systemd:a b", "write systemd:NAME"),
        ("[fe80::1]:80", "say on which interface, for example [fe80::1%eth0]:PORT"),
        ("[2001:db8::1%eth0]:80", "only a link-local address has a zone: write [2001:db8::1]:PORT"),
        ("[fe80::1%]:80", "'' is no name of an interface, like eth0"),
        ("[fe80::1%a-name-that-is-too-long]:80", "is no name of an interface"),
        ("[fe80::1%e/0]:80", "is no name of an interface"),
    ],
)
def test_what_cannot_be_bound_is_told_what_to_write(text: str, words: str) -> None:
    with pytest.raises(AddressError) as caught:
        parse_bind_entry(text)
    assert words in str(caught.value)


def test_client_may_name_no_zone() -> None:
    with pytest.raises(AddressError, match="an address with a zone is not accepted"):
        parse_destination("[fe80::1%eth0]:80")


@pytest.mark.parametrize(
    ("text", "server"),
    [
        ("10.0.0.1:same", SamePort("10.0.0.1", False)),
        ("[2001:db8::1]:same", SamePort("2001:db8::1", False)),
        ("[fe80::1%eth0]:same", SamePort("fe80::1%eth0", False)),
        ("web.example:same", SamePort("web.example", True)),
        ("[fe80::1%eth0]:80", Address("fe80::1%eth0", 80)),
    ],
)
def test_server_is_read_and_written_alike(text: str, server: object) -> None:
    assert parse_configured_server(text) == server
    assert str(server) == text


@pytest.mark.parametrize("text", [":same", "unix:same", "a b:same", "10.0.0.1:Same"])
def test_server_without_a_host_has_no_port_either(text: str) -> None:
    with pytest.raises(AddressError):
        parse_configured_server(text)


def test_same_port_is_that_of_the_client() -> None:
    assert SamePort("10.0.0.1", False).at(9203) == Address("10.0.0.1", 9203)
    assert SamePort("web.example", True).at(443) == HostPort("web.example", 443)


def test_listener_binds_all_of_a_list_and_of_its_ranges() -> None:
    listener = config_of(
        'bind: ["127.0.0.1:9200-9202", "[::1]:80", "unix:/run/x"], mode: "0660", ' + RULES
    ).listeners[0]
    assert listener.addresses == (
        Address("127.0.0.1", 9200),
        Address("127.0.0.1", 9201),
        Address("127.0.0.1", 9202),
        Address("::1", 80),
        UnixAddress("/run/x"),
    )
    assert not listener.is_unix


def test_dual_stack_binds_every_ipv6_port_for_ipv4_too() -> None:
    listener = config_of('bind: ["[::]:80-81", "[::1]:90"], dual_stack: true, ' + RULES).listeners[
        0
    ]
    assert bind_text(listener.addresses) == "[::]:80,0.0.0.0:80,[::]:81,0.0.0.0:81,[::1]:90"


@pytest.mark.parametrize(
    ("listener", "words"),
    [
        ("bind: [], " + RULES, "an empty list binds nothing"),
        ('bind: ["127.0.0.1:80", 443], ' + RULES, "write 127.0.0.1:443 for this host"),
        ('bind: ["127.0.0.1:80-90", "127.0.0.1:85"], ' + RULES, "127.0.0.1:85 is bound by this"),
        ('bind: ["[::]:80", "0.0.0.0:80"], dual_stack: true, ' + RULES, "bound by this listener"),
        ('bind: "0.0.0.0:80", dual_stack: true, ' + RULES, 'write `bind: "[::]:PORT"`'),
        ('bind: "[::]:80", freebind: true, ' + RULES, "leave it out"),
        ("bind: unix:/run/x, freebind: true, " + RULES, "leave it out"),
        ('bind: ["10.0.0.9:1-65535"], ' + RULES, "65535 addresses are more than 16384"),
        ('bind: ["unix:/run/x", "10.0.0.9:53"], protocol: udp, ' + RULES, "carries a stream"),
        (
            'bind: ["unix:/run/x", "10.0.0.9:80"], proxy_protocol: {accept: true}, ' + RULES,
            "whose PROXY headers are to be believed?",
        ),
        (
            'bind: "127.0.0.1:80-90", rules: [{match: any, to: "127.0.0.1:same"}]',
            "127.0.0.1:80 is a listener of this forwarder",
        ),
        (
            'bind: "0.0.0.0:80-90", rules: [{match: any, to: "127.0.0.1:88"}]',
            "127.0.0.1:88 is a listener of this forwarder",
        ),
        (
            "bind: unix:/run/x, rules: [{match: any, to: 10.0.0.1:same}]",
            "a unix socket has none: write the port",
        ),
    ],
)
def test_configuration_that_cannot_be_bound_says_what_to_write(listener: str, words: str) -> None:
    assert words in str(error_of(listener))


def test_unix_listener_cannot_lead_to_the_same_port_of_an_upstream() -> None:
    error = error_of(
        "bind: unix:/run/x, rules: [{match: any, to: web}]",
        "upstreams: {web: {servers: [10.0.0.1:same]}}",
    )
    assert error.path == "listeners[0].rules[0].to"
    assert "a unix socket has none" in str(error)


def test_server_without_a_port_of_its_own_cannot_be_checked() -> None:
    error = error_of(
        "bind: 127.0.0.1:80, rules: [{match: any, to: web}]",
        "upstreams: {web: {health: {}, servers: [10.0.0.1:80, 10.0.0.2:same]}}",
    )
    assert error.path == "upstreams.web.servers[1]"
    assert "has no port that `health` could ask" in str(error)


def test_dump_has_the_list_as_it_was_written() -> None:
    config = config_of(
        'bind: ["127.0.0.1:9200-9210", systemd:web, "10.0.0.9:80"], freebind: true, '
        "rules: [{match: any, to: 10.0.0.1:same}]"
    )
    text = dump_config(config)
    assert dump_config(parse_config(text, source="dump")) == text
    assert "- 127.0.0.1:9200-9210\n" in text
    assert "to: 10.0.0.1:same\n" in text
    assert "freebind: true\n" in text


def test_one_moved_listener_is_no_list_any_more() -> None:
    config = config_of('bind: ["[::]:80", "[::1]:90"], dual_stack: true, ' + RULES)
    moved = config.listening_on("127.0.0.1:7777").listeners[0]
    assert (moved.bind, moved.dual_stack) == ((Address("127.0.0.1", 7777),), False)
    assert not config.can_move("main")
    assert config.with_port("main", 7777) is config


def test_texts_of_addresses_have_consecutive_ports_as_one() -> None:
    binds = [Address("10.0.0.1", port) for port in (1, 2, 4, 5, 6, 9)]
    assert bind_text([*binds, UnixAddress("/x"), Address("::1", 10)]) == (
        "10.0.0.1:1-2,10.0.0.1:4-6,10.0.0.1:9,unix:/x,[::1]:10"
    )


def test_zone_is_the_number_of_its_interface() -> None:
    number = socket.if_nametoindex("lo")
    assert sockaddr(Address("fe80::1%lo", 80)) == ("fe80::1", 80, 0, number)
    assert sockaddr(Address("fe80::1%7", 80)) == ("fe80::1", 80, 0, 7)
    assert sockaddr(Address("::1", 80)) == ("::1", 80)
    with pytest.raises(OSError, match=r"No such device|no interface"):
        sockaddr(Address("fe80::1%nosuchlink", 80))


@pytest.mark.parametrize(
    ("host", "kind", "listens", "protocol", "words"),
    [
        ("::", socket.SOCK_STREAM, True, "tcp", "write BindIPv6Only=ipv6-only"),
        ("127.0.0.1", socket.SOCK_DGRAM, False, "tcp", "wants a socket of ListenStream="),
        ("127.0.0.1", socket.SOCK_STREAM, True, "udp", "wants a socket of ListenDatagram="),
        ("127.0.0.1", socket.SOCK_STREAM, False, "tcp", "write Accept=no"),
    ],
)
def test_socket_of_systemd_that_cannot_be_served_says_what_to_write(
    host: str, kind: int, listens: bool, protocol: str, words: str
) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as sock:
        sock.bind((host, 0))
        if listens:
            sock.listen()
        with pytest.raises(ForwarderError) as caught:
            usable_address(SystemdSockets("web"), protocol, sock)
    assert words in str(caught.value)
    assert str(caught.value).startswith("systemd:web: ")


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    made = Listeners(2, Activation({}))
    yield made
    made.close()


def take(listeners: Listeners, config: Config) -> None:
    following, obsolete = listeners.change_to(config)
    listeners.commit(config, following, obsolete)


def test_both_families_have_the_one_port_that_the_kernel_has_chosen(listeners: Listeners) -> None:
    take(listeners, config_of('bind: "[::]:0", dual_stack: true, ' + RULES))
    ipv6, ipv4 = listeners.binds()["main"]
    assert isinstance(ipv6, Address)
    assert ipv4 == Address("0.0.0.0", ipv6.port)
    take(listeners, config_of('bind: "[::]:0", dual_stack: true, ' + RULES))
    assert listeners.binds()["main"] == (ipv6, ipv4)


def test_reload_keeps_the_sockets_of_addresses_that_stay(listeners: Listeners) -> None:
    take(listeners, config_of('bind: ["127.0.0.1:0", "127.0.0.2:0"], ' + RULES))
    one, two = listeners.bound["main"]
    take(listeners, config_of('bind: ["127.0.0.3:0", "127.0.0.2:0"], ' + RULES))
    assert listeners.bound["main"][1] is two
    assert not one.sockets
    assert len(two.sockets) == 2


def test_address_that_cannot_be_bound_changes_nothing(listeners: Listeners) -> None:
    take(listeners, config_of("bind: 127.0.0.1:0, " + RULES))
    before = listeners.binds()
    with pytest.raises(ForwarderError, match=r"`freebind: true` binds addresses"):
        listeners.change_to(config_of('bind: ["127.0.0.2:0", "192.0.2.1:80"], ' + RULES))
    assert listeners.binds() == before


@pytest.mark.parametrize("hosts", [("0.0.0.0", "127.0.0.9"), ("127.0.0.9", "0.0.0.0")])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_port_that_another_listener_of_ours_still_has_names_it(
    listeners: Listeners, hosts: tuple[str, str], protocol: str
) -> None:
    before, after = hosts
    more = f"protocol: {protocol}, {RULES}"
    take(listeners, config_of(f"name: old, bind: '{before}:0', {more}"))
    (has,) = listeners.binds()["old"]
    assert isinstance(has, Address)
    with pytest.raises(ForwarderError) as caught:
        listeners.change_to(config_of(f"name: new, bind: '{after}:{has.port}', {more}"))
    assert str(caught.value) == (
        f"cannot listen on {after}:{has.port}: Address already in use by the listener 'old', "
        f"which has {has}: take that away first, and add this one in a second change"
    )
    # Of a stranger's nothing is said.
    take(listeners, config_of(f"name: other, bind: '127.0.0.1:0', {more}"))
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind((before, 0))
        if protocol == "tcp":
            sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(ForwarderError, match=r"Address already in use$"):
            listeners.change_to(config_of(f"name: new, bind: '{after}:{port}', {more}"))


@pytest.mark.parametrize("host", ["192.0.2.1", "[2001:db8::1]"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_freebind_takes_an_address_that_is_missing(
    listeners: Listeners, host: str, protocol: str
) -> None:
    config = config_of(f'bind: "{host}:0", freebind: true, protocol: {protocol}, {RULES}')
    take(listeners, config)
    assert str(listeners.binds()["main"][0]).startswith(f"{host}:")


def test_name_that_systemd_has_not_passed_says_what_to_write(listeners: Listeners) -> None:
    with pytest.raises(ForwarderError, match=r"write FileDescriptorName=web in the \.socket unit"):
        listeners.change_to(config_of("bind: systemd:web, " + RULES))


ACTIVATED = """
import os, socket, sys
from pyforwarder.supervisor.listeners.activation import Activation
from pyforwarder.core.address import SystemdSockets
from pyforwarder.errors import ForwarderError
listening = socket.create_server(("127.0.0.1", 0))
for fd, number in ((listening.fileno(), 13), (os.open("/dev/null", os.O_RDWR), 14)):
    os.dup2(fd, number)
listening.close()
for number in (3, 4):
    os.dup2(number + 10, number)
environ = {"LISTEN_PID": sys.argv[1].format(pid=os.getpid()), "LISTEN_FDS": sys.argv[2]}
activation = Activation({**environ, "LISTEN_FDNAMES": sys.argv[3]})
for name in sys.argv[4:]:
    try:
        print(name, len(activation.sockets(SystemdSockets(name), "tcp")))
    except ForwarderError as error:
        print(name, "none" if "has no socket of that name" in str(error) else error)
"""


@pytest.mark.parametrize(
    ("pid", "count", "names", "said"),
    [
        ("{pid}", "2", "web:null", "web 1\nnull none\nunknown none\n"),
        ("{pid}", "2", "", "web none\nnull none\nunknown 1\n"),
        ("{pid}", "40", "web", "web 1\nnull none\nunknown 1\n"),
        ("1", "2", "web:null", "web none\nnull none\nunknown none\n"),
        ("{pid}", "-1", "web:null", "web none\nnull none\nunknown none\n"),
        ("{pid}", "many", "web:null", "web none\nnull none\nunknown none\n"),
        ("", "2", "web:null", "web none\nnull none\nunknown none\n"),
    ],
)
def test_only_sockets_that_are_for_this_process_are_taken(
    pid: str, count: str, names: str, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ACTIVATED, pid, count, names, "web", "null", "unknown"],
        capture_output=True,
        text=True,
        timeout=scaled_s(30),
        check=False,
    )
    assert (done.stdout, done.stderr) == (said, "")
