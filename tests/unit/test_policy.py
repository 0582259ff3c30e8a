"""Which destinations a client may name.  What is refused here is what keeps a host safe."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyforwarder.core.address import Address, AddressError, UnixAddress
from pyforwarder.core.policy import (
    CACHE_SIZE,
    GUARDS,
    AllowList,
    Networks,
    OwnListeners,
    carried_ipv4,
    parse_ip,
    parse_network,
)


def permits(entries: list[str], ip: str, port: int = 80) -> bool:
    return AllowList.parse(entries).permits(ip, port)


@pytest.mark.parametrize(
    ("entries", "ip", "expected"),
    [
        (["loopback"], "127.0.0.1", True),
        (["loopback"], "127.255.255.255", True),
        (["loopback"], "::1", True),
        (["loopback"], "128.0.0.0", False),
        (["loopback"], "::2", False),
        (["loopback"], "0.0.0.0", False),
        (["loopback"], "::", False),
        (["loopback"], "10.0.0.1", False),
        (["private"], "10.255.0.1", True),
        (["private"], "172.31.0.1", True),
        (["private"], "172.32.0.1", False),
        (["private"], "192.168.3.4", True),
        (["private"], "fd12::1", True),
        (["private"], "127.0.0.1", False),
        (["private"], "100.64.0.1", False),
        (["private"], "169.254.1.1", False),
        (["public"], "8.8.8.8", True),
        (["public"], "2a00::1", True),
        (["public"], "127.0.0.1", False),
        (["public"], "10.0.0.1", False),
        (["public"], "100.64.0.1", False),
        (["public"], "198.18.0.1", False),
        (["public"], "240.0.0.1", False),
        (["public"], "::1", False),
        (["public"], "fd00::1", False),
        (["public"], "fec0::1", False),
        (["public"], "2001:db8::1", False),
        (["public"], "64:ff9b::808:808", True),
        (["public"], "64:ff9b::a00:1", False),
        (["any"], "8.8.8.8", True),
        (["any"], "127.0.0.1", True),
        (["any"], "2a00::1", True),
        (["10.0.0.0/8"], "10.1.2.3", True),
        (["10.0.0.0/8"], "11.1.2.3", False),
        (["10.1.2.3"], "10.1.2.3", True),
        (["10.1.2.3"], "10.1.2.4", False),
        (["fd00::/8"], "fd00::1", True),
        (["[fd00::1]"], "fd00::1", True),
        (["::/0"], "8.8.8.8", False),
        (["0.0.0.0/0"], "2a00::1", False),
        (["10.0.0.0/8", "fd00::/8"], "fd00::1", True),
        ([], "127.0.0.1", False),
    ],
)
def test_an_entry_covers_what_it_says(entries: list[str], ip: str, expected: bool) -> None:
    assert permits(entries, ip) is expected


@pytest.mark.parametrize(
    ("entry", "port", "expected"),
    [
        ("10.0.0.0/8:80,443,8000-8999", 80, True),
        ("10.0.0.0/8:80,443,8000-8999", 443, True),
        ("10.0.0.0/8:80,443,8000-8999", 8000, True),
        ("10.0.0.0/8:80,443,8000-8999", 8999, True),
        ("10.0.0.0/8:80,443,8000-8999", 9000, False),
        ("10.0.0.0/8:80,443,8000-8999", 7999, False),
        ("10.0.0.0/8:80,443,8000-8999", 81, False),
        ("any:22", 22, True),
        ("any:22", 23, False),
        ("private:1-65535", 65535, True),
        ("10.0.0.1:80", 80, True),
        ("10.0.0.1:80", 8, False),
        ("10.0.0.1", 0, False),
        ("any", 65536, False),
        ("any", -1, False),
    ],
)
def test_an_entry_is_held_to_its_ports(entry: str, port: int, expected: bool) -> None:
    assert permits([entry], "10.0.0.1", port) is expected


@pytest.mark.parametrize(
    "entry", ["[fd00::1]:443", "[fd00::/8]:443", "[fd00::]/8:443", "fd00::/8:443", "private:443"]
)
def test_ipv6_entries_may_have_ports(entry: str) -> None:
    assert permits([entry], "fd00::1", 443)
    assert not permits([entry], "fd00::1", 444)


def test_ports_of_one_entry_do_not_leak_into_another() -> None:
    allow = ["10.0.0.1:80", "10.0.0.2:443"]
    assert permits(allow, "10.0.0.1", 80)
    assert not permits(allow, "10.0.0.1", 443)
    assert not permits(allow, "10.0.0.2", 80)


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "lopback",
        "loopback:",
        "loopback:0",
        "loopback:65536",
        "loopback:80-79",
        "loopback:80,",
        "loopback:-80",
        "loopback:80-",
        "loopback: 80",
        "localhost",
        "example.com:80",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "10.0.0.0/255.0.0.0/8",
        "10.0.0.0/-1",
        "10.0.0",
        "443",
        "8000-8999",
        "127.1",
        "0x7f000001",
        "fd00::1:80",
        "[fd00::1",
        "[fd00::1]443",
        "[127.0.0.1]:80",
        "[fd00::1]]",
        "fe80::1%eth0",
        "fe80::/10%eth0",
        "ANY",
    ],
)
def test_an_entry_that_is_none_is_an_error(entry: str) -> None:
    with pytest.raises(AddressError):
        AllowList.parse([entry])


def test_the_comma_that_yaml_takes_for_its_own_is_explained() -> None:
    with pytest.raises(AddressError, match="needs quotes"):
        AllowList.parse(["10.0.0.0/8:80", "443"])


def test_host_bits_are_explained() -> None:
    with pytest.raises(AddressError, match=r"10\.0\.0\.0/8 is meant"):
        AllowList.parse(["10.0.0.1/8"])


def test_an_entry_with_two_readings_is_explained() -> None:
    with pytest.raises(AddressError, match=r"write \[fd00::1\]:80 or \[fd00::1:80\]"):
        AllowList.parse(["fd00::1:80"])


# --- guarded addresses

GUARDED = [
    "0.0.0.0",
    "0.1.2.3",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "168.63.129.16",
    "224.0.0.1",
    "239.255.255.255",
    "255.255.255.255",
    "::",
    "fe80::1",
    "febf::1",
    "ff02::1",
    "fd00:ec2::254",
    "fd20:ce::254",
    "64:ff9b:1::a00:1",
]


@pytest.mark.parametrize("ip", GUARDED)
@pytest.mark.parametrize(
    "entries",
    [
        ["any"],
        ["private", "public", "loopback"],
        ["0.0.0.0/0", "::/0"],
        ["128.0.0.0/1", "0.0.0.0/1", "8000::/1", "::/1"],
    ],
)
def test_nothing_wide_reaches_a_guarded_address(entries: list[str], ip: str) -> None:
    assert not permits(entries, ip)


@pytest.mark.parametrize("ip", GUARDED)
def test_a_guarded_address_can_be_named(ip: str) -> None:
    assert permits([ip if ":" not in ip else f"[{ip}]"], ip)
    bits = 128 if ":" in ip else 32
    assert permits([f"{ip}/{bits}:80"], ip, 80)
    assert not permits([f"{ip}/{bits}:80"], ip, 81)


@pytest.mark.parametrize("ip", GUARDED)
def test_naming_one_guarded_address_does_not_open_the_others(ip: str) -> None:
    allow = AllowList.parse(["any", f"{ip}/{128 if ':' in ip else 32}"])
    assert [other for other in GUARDED if allow.permits(other, 80)] == [ip]


def test_a_network_inside_link_local_opens_itself_and_not_the_metadata_in_it() -> None:
    allow = AllowList.parse(["169.254.0.0/16"])
    assert allow.permits("169.254.1.1", 80)
    assert not allow.permits("169.254.169.254", 80)
    assert not allow.permits("169.254.170.2", 80)
    assert not permits(["169.254.169.0/24"], "169.254.169.254")
    assert not permits(["169.254.0.0/15"], "169.254.1.1")


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: str(guard.network))
def test_every_guard_guards_its_ends(guard: object) -> None:
    network = guard.network  # type: ignore[attr-defined]
    for number in (0, -1):
        assert not permits(["any"], str(network[number]))


# --- an address is a number, not a text

SPELLINGS_OF_METADATA = [
    "::ffff:169.254.169.254",  # IPv4-mapped
    "::ffff:a9fe:a9fe",
    "0:0:0:0:0:ffff:a9fe:a9fe",
    "::ffff:169.254.169.254%1",
    "::169.254.169.254",  # IPv4-compatible
    "::ffff:0:169.254.169.254",  # IPv4-translated
    "64:ff9b::169.254.169.254",  # NAT64
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",  # 6to4
    "2001:0:a9fe:a9fe::1",  # Teredo, as the server
    "2001:0:101:101:0:0:5601:5601",  # Teredo, as the client, inverted
    "2a00::5efe:a9fe:a9fe",  # ISATAP
    "2a00::200:5efe:a9fe:a9fe",
]


@pytest.mark.parametrize("ip", SPELLINGS_OF_METADATA)
def test_metadata_is_refused_in_every_spelling(ip: str) -> None:
    assert not permits(["any"], ip)
    assert not permits(["0.0.0.0/0", "::/0"], ip)


@pytest.mark.parametrize(
    "ip",
    [
        "::7f00:1",
        "::ffff:0:7f00:1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::1",
        "2001:0:7f00:1::1",
        "2001:0:101:101::80ff:fffe",
        "2a00::5efe:7f00:1",
    ],
)
def test_loopback_is_not_reached_through_a_carrier(ip: str) -> None:
    assert not permits(["public"], ip)
    assert not permits(["::/0", "8.8.8.8"], ip)
    assert permits(["::/0", "0.0.0.0/0"], ip)


@pytest.mark.parametrize(
    "ip",
    [
        "127.1",
        "127.0.1",
        "2130706433",
        "0x7f000001",
        "0x7f.0.0.1",
        "0177.0.0.1",
        "127.0.0.01",
        "127.0.0.1 ",
        " 127.0.0.1",
        "127.0.0.1\0",
        "127.0.0.1:80",
        "[::1]",
        "\uff11\uff12\uff17.0.0.1",
        "localhost",
        "",
        "::1/128",
        "1::2::3",
    ],
)
def test_what_is_no_standard_address_is_refused(ip: str) -> None:
    assert not permits(["any"], ip)
    assert "not a numeric address" in (AllowList.parse(["any"]).refusal(ip, 80) or "")


def test_a_mapped_address_is_its_ipv4_address() -> None:
    assert permits(["loopback"], "::ffff:127.0.0.1")
    assert permits(["10.0.0.0/8"], "::ffff:10.0.0.1")
    assert not permits(["::/0"], "::ffff:10.0.0.1")


def test_a_mapped_network_is_its_ipv4_network() -> None:
    assert parse_network("::ffff:10.0.0.0/104") == ipaddress.ip_network("10.0.0.0/8")
    assert permits(["::ffff:10.0.0.0/104"], "10.0.0.1")


def test_what_is_carried_must_be_allowed_too_unless_the_carrier_is_written_out() -> None:
    assert not permits(["64:ff9b::/96"], "64:ff9b::808:808")
    assert permits(["64:ff9b::/96", "8.8.8.0/24"], "64:ff9b::808:808")
    assert not permits(["8.8.8.0/24"], "64:ff9b::808:808")
    assert permits(["[64:ff9b::808:808]"], "64:ff9b::808:808")


def test_what_is_carried_is_held_to_the_port() -> None:
    allow = ["64:ff9b::/96", "8.8.8.8:53"]
    assert permits(allow, "64:ff9b::808:808", 53)
    assert not permits(allow, "64:ff9b::808:808", 80)


def test_ordinary_ipv6_addresses_carry_nothing() -> None:
    for text in ("::", "::1", "2a00::1", "fd00::1", "fe80::1", "ff02::1"):
        assert carried_ipv4(parse_ip(text)) == ()


@given(st.ip_addresses(v=4), st.integers(1, 65535), st.sampled_from(["any", "public", "private"]))
def test_no_carrier_reaches_what_is_refused_plainly(
    ip: ipaddress.IPv4Address, port: int, word: str
) -> None:
    allow = AllowList.parse([word])
    number = int(ip)
    carriers = [
        (0xFFFF << 32) | number,
        number if number > 1 else (0xFFFF << 32) | number,
        (0xFFFF << 48) | number,
        (0x64FF9B << 96) | number,
        (0x2002 << 112) | (number << 80) | 1,
        (0x2001_0000 << 96) | (0x0808_0808 << 64) | (~number & 0xFFFF_FFFF),
        (0x2A00 << 112) | (0x5EFE << 32) | number,
    ]
    if allow.permits(str(ip), port):
        return
    for carrier in carriers:
        assert not allow.permits(str(ipaddress.IPv6Address(carrier)), port)


@given(st.text(), st.integers())
def test_nothing_makes_the_judgement_raise(text: str, port: int) -> None:
    if AllowList.parse(["any"]).permits(text, port):
        assert 1 <= port <= 65535
        parse_ip(text)


@given(st.text(max_size=40))
def test_an_entry_is_read_or_an_address_error(text: str) -> None:
    try:
        allow = AllowList.parse([text])
    except AddressError:
        return
    assert allow.entries == (text,)


def test_refusals_say_why() -> None:
    allow = AllowList.parse(["10.0.0.0/8:80", "any:81", "64:ff9b::/96"])
    assert allow.refusal("10.0.0.1", 80) is None
    assert allow.refusal("10.0.0.1", 82) == "allow does not list 10.0.0.1 port 82"
    assert allow.refusal("169.254.169.254", 81) == (
        "169.254.169.254 is guarded (cloud metadata), and allow does not name it exactly"
    )
    assert allow.refusal("64:ff9b::808:808", 82) == (
        "64:ff9b::808:808 carries 8.8.8.8: allow does not list 8.8.8.8 port 82"
    )


def test_a_flood_of_destinations_does_not_grow_the_cache() -> None:
    allow = AllowList.parse(["any"])
    for number in range(CACHE_SIZE + 100):
        allow.permits(str(ipaddress.IPv4Address(0x0B00_0000 + number)), 80)
    assert allow._refusal.cache_info().currsize == CACHE_SIZE


def test_lists_are_equal_by_what_they_say() -> None:
    assert AllowList.parse(["any"]) == AllowList.parse(["any"])
    assert AllowList.parse(["any"]) != AllowList.parse(["private"])
    assert hash(AllowList.parse(["any"])) == hash(AllowList.parse(["any"]))
    assert Networks.parse(["any"]) == Networks.parse(["any"])
    assert Networks.parse(["any"]) != AllowList.parse(["any"])
    assert repr(AllowList.parse(["any"])) == "AllowList(['any'])"


# --- sets of networks


def test_a_set_of_networks_contains_by_number() -> None:
    trusted = Networks.parse(["10.0.0.0/8", "fd00::/8", "loopback"])
    assert trusted.contains("10.1.2.3")
    assert trusted.contains("::ffff:10.1.2.3")
    assert trusted.contains("fd00::1")
    assert trusted.contains("::1")
    assert not trusted.contains("11.0.0.1")
    assert not trusted.contains("64:ff9b::a00:1")
    assert not trusted.contains("nonsense")


def test_an_empty_set_contains_nobody() -> None:
    assert not Networks.parse([])
    assert Networks.parse(["any"])
    assert not Networks.parse([]).contains("127.0.0.1")


def test_a_set_of_networks_has_no_ports() -> None:
    with pytest.raises(AddressError, match="ports mean nothing"):
        Networks.parse(["10.0.0.0/8:80"])


# --- never to ourselves


def no_other_is_local(ip: str) -> bool:
    return False


def asked_in_vain(ip: str) -> bool:
    raise AssertionError(f"asked about {ip}")


@pytest.mark.parametrize(
    ("bind", "destination", "expected"),
    [
        (Address("127.0.0.1", 9999), Address("127.0.0.1", 9999), True),
        (Address("127.0.0.1", 9999), Address("::ffff:127.0.0.1", 9999), True),
        (Address("127.0.0.1", 9999), Address("127.0.0.1", 9998), False),
        (Address("127.0.0.1", 9999), Address("127.0.0.2", 9999), False),
        (Address("127.0.0.1", 9999), Address("0.0.0.0", 9999), True),
        (Address("::1", 9999), Address("::", 9999), True),
        (Address("10.0.0.1", 9999), Address("0.0.0.0", 9999), False),
        (Address("::1", 9999), Address("0:0::1", 9999), True),
        (Address("127.0.0.1", 9999), Address("name", 9999), False),
        (UnixAddress("/run/a"), UnixAddress("/run/a"), True),
        (UnixAddress("/run/a"), UnixAddress("/run/b"), False),
        (UnixAddress("/run/a"), Address("127.0.0.1", 9999), False),
    ],
)
def test_a_listener_with_an_address_is_recognised(
    bind: Address | UnixAddress, destination: Address | UnixAddress, expected: bool
) -> None:
    own = OwnListeners([bind])
    assert own.includes(destination, is_local=asked_in_vain) is expected


@pytest.mark.parametrize("wildcard", ["0.0.0.0", "::"])
def test_a_wildcard_listener_is_every_local_address(wildcard: str) -> None:
    own = OwnListeners([Address(wildcard, 9999)])
    for ip in ("127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::"):
        assert own.includes(Address(ip, 9999), is_local=no_other_is_local)
    assert own.includes(Address("10.0.0.1", 9999), is_local=lambda ip: ip == "10.0.0.1")
    assert not own.includes(Address("10.0.0.2", 9999), is_local=lambda ip: ip == "10.0.0.1")
    assert not own.includes(Address("127.0.0.1", 9998), is_local=asked_in_vain)
