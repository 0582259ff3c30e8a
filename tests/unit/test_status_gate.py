"""Who may ask the page: its names, pages of others, passwords and how often they may be wrong."""

from __future__ import annotations

import base64
from email.message import Message
from http import HTTPStatus

import pytest

from pyforwarder.status.gate import (
    AT_ONCE_IN_ALL,
    SUSPECT_S,
    TOKEN_HEADER,
    WRONG_PER_CLIENT,
    Doubt,
    Gate,
)
from pyforwarder.status.http import Answer, Request

PASSWORDS = {"ann": b"secret:with colon", "bob": b"x"}


def request(method: str = "GET", path: str = "/", /, **headers: str) -> Request:
    message = Message()
    for name, value in {"Host": "127.0.0.1:9997", **headers}.items():
        message[name.replace("_", "-")] = value
    return Request(method, path, "", message)


def basic(name: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


def status_of(answer: object) -> int:
    assert isinstance(answer, Answer)
    return answer.status.value


def gate(*users: str, hosts: tuple[str, ...] = ()) -> Gate:
    return Gate(hosts=hosts, passwords={name: PASSWORDS[name] for name in users})


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.0.0.1:9997", "10.1.2.3:80", "[::1]:9997", "[2001:db8::1]"),
        *("localhost", "LocalHost:8080", "ops.example.com", "OPS.example.com:443"),
    ],
)
def test_an_address_and_a_name_of_the_page_are_its_own(host: str) -> None:
    one = gate(hosts=("ops.example.com",))
    assert one.refuses_browser(request(Host=host)) is None


@pytest.mark.parametrize(
    "host",
    [
        *(
            "",
            "evil.example",
            "evil.example:9997",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
        ),
        *("ops.example.com.evil.example", "[::1", "[::1]x", "127.1", "0x7f000001", "::1", "a b"),
        *("evil.example@127.0.0.1x", "evil.example#127.0.0.1", "2130706433"),
    ],
)
def test_another_name_that_leads_here_is_refused(host: str) -> None:
    # DNS rebinding: a browser takes the page for one of that name's origin.
    one = gate(hosts=("ops.example.com",))
    assert status_of(one.refuses_browser(request(Host=host))) == HTTPStatus.MISDIRECTED_REQUEST


def test_pages_of_others_get_nothing_and_links_lead_to_the_page_alone() -> None:
    one = gate()

    def refused(path: str, site: str, mode: str, method: str = "GET") -> bool:
        asked = request(method, path, Sec_Fetch_Site=site, Sec_Fetch_Mode=mode)
        return one.refuses_browser(asked) is not None

    for site in ("cross-site", "same-site", "unheard-of"):
        assert not refused("/", site, "navigate")
        assert refused("/", site, "no-cors")
        assert refused("/", site, "navigate", "POST")
        for path in ("/live", "/pairs", "/app.js", "/flush"):
            assert refused(path, site, "navigate")
            assert refused(path, site, "cors")
    for site in ("same-origin", "none"):
        assert not refused("/live", site, "cors")
        assert not refused("/flush", site, "cors", "POST")


def test_an_order_comes_from_our_own_page() -> None:
    one = gate()
    good = {
        "Origin": "http://127.0.0.1:9997",
        "Content-Type": "application/json",
        TOKEN_HEADER: one.token,
    }

    def status(**changes: str) -> int:
        headers = {name.replace("-", "_"): value for name, value in good.items()}
        answer = one.refuses_order(request("POST", "/flush", **{**headers, **changes}))
        return 0 if answer is None else answer.status.value

    assert status() == 0
    assert status(Origin="") == 0  # an old browser, or none
    assert status(Content_Type="application/json; charset=utf-8") == 0
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9998", "http://[::1"):
        assert status(Origin=origin) == 403, origin
    for kind in ("", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert status(Content_Type=kind) == 415, kind
    for token in ("", "x", one.token[:-1], one.token + "x", "\xe4"):
        assert status(X_Pyforwarder_Token=token) == 403, token
    assert gate().token != one.token


def test_without_users_nobody_is_asked() -> None:
    one = gate()
    assert one.who(request(), "127.0.0.1", 0.0) == ""
    assert one.who(request(Authorization=basic("ann", "wrong")), "127.0.0.1", 0.0) == ""


def test_a_user_is_asked_and_compared_once() -> None:
    one = gate("ann", "bob")
    nobody = one.who(request(), "::1", 0.0)
    assert isinstance(nobody, Answer)
    assert nobody.status == HTTPStatus.UNAUTHORIZED
    assert dict(nobody.headers)["WWW-Authenticate"].startswith("Basic realm=")
    for _ in range(5):
        assert (
            one.who(request(Authorization=basic("ann", "secret:with colon")), "::1", 0.0) == "ann"
        )
    assert (
        one.who(request(Authorization=basic("bob", "x").replace("Basic", "bAsIc")), "::1", 0.0)
        == "bob"
    )


@pytest.mark.parametrize(
    "said",
    [
        "Bearer x",
        "Basic",
        "Basic !!!",
        "Basic eA==",
        "Digest username=ann",
        "Basic \xff",
        "x" * 5000,
    ],
)
def test_what_is_no_name_and_password_is_asked_again_and_costs_nothing(said: str) -> None:
    one = gate("ann")
    for _ in range(100):
        assert status_of(one.who(request(Authorization=said), "::1", 0.0)) == 401


def test_users_of_something_else_do_not_come_in() -> None:
    one = gate("ann")
    assert status_of(one.who(request(Authorization=basic("bob", "x")), "::1", 0.0)) == 401
    assert status_of(one.who(request(Authorization=basic("", "")), "::1", 0.0)) == 401


def test_guessing_ends_soon_and_known_people_do_not_notice() -> None:
    one = gate("ann")
    right = request(Authorization=basic("ann", "secret:with colon"))
    assert one.who(right, "192.0.2.1", 0.0) == "ann"
    answers = [
        status_of(one.who(request(Authorization=basic("ann", f"guess {n}")), "192.0.2.1", 0.0))
        for n in range(50)
    ]
    assert answers == [401] * WRONG_PER_CLIENT + [429] * (50 - WRONG_PER_CLIENT)
    assert one.who(right, "192.0.2.1", 0.0) == "ann"
    # From elsewhere a person logs in meanwhile, and from there later.
    assert status_of(one.who(request(Authorization=basic("ann", "x")), "192.0.2.2", 0.0)) == 401
    assert status_of(one.who(request(Authorization=basic("ann", "x")), "192.0.2.1", 10.0)) == 401


def test_guessing_from_many_addresses_keeps_nobody_out_in_bounded_memory() -> None:
    one = gate("ann")
    guess = request(Authorization=basic("ann", "x"))
    answers = [one.who(guess, f"2001:db8:{n:x}::1", 0.0) for n in range(6000)]
    assert [status_of(answer) for answer in answers[:AT_ONCE_IN_ALL]] == [401] * AT_ONCE_IN_ALL
    # The rest is compared at a pace, and so is the right one from elsewhere: it is not refused.
    assert all(isinstance(answer, Doubt) for answer in answers[AT_ONCE_IN_ALL:])
    assert len(one._clients) == 4096
    right = one.who(
        request(Authorization=basic("ann", "secret:with colon")), "2001:db8:ffff::1", 0.0
    )
    assert isinstance(right, Doubt)
    assert one.is_right(right.stored, right.password)
    assert right.settle(True) == "ann"
    # One host has a whole /64, and of IPv4 one address, however a socket for both shows it.
    for hosts in ([f"2001:db8::{n:x}" for n in range(50)], ["192.0.2.1", "::ffff:192.0.2.1"] * 25):
        other = gate("ann")
        answers = [other.who(guess, host, 0.0) for host in hosts]
        assert [status_of(answer) for answer in answers].count(401) == WRONG_PER_CLIENT
    assert status_of(other.who(guess, "::ffff:192.0.2.2", 0.0)) == 401


def test_a_client_that_was_wrong_lately_is_suspect_and_one_that_gave_up_or_was_right_is_not() -> (
    None
):
    one = Gate(passwords={"ann": b"$2b$04$" + b"a" * 53})

    def doubt(password: str, now_s: float) -> Doubt:
        found = one.who(request(Authorization=basic("ann", password)), "192.0.2.1", now_s)
        assert isinstance(found, Doubt)
        return found

    first = doubt("x", 0.0)
    assert not first.is_suspect
    assert status_of(first.settle(False)) == 401
    assert doubt("y", SUSPECT_S - 1).is_suspect
    assert not doubt("z", SUSPECT_S + 1).is_suspect
    for _ in range(10):
        doubt("z", 2 * SUSPECT_S).drop()  # it was not compared, and is none of the five


def test_a_hash_is_compared_elsewhere_and_counts_as_wrong_until_it_is_right() -> None:
    stored = b"$2b$04$" + b"a" * 53
    one = Gate(passwords={"ann": stored})
    guess = request(Authorization=basic("ann", "x"))
    doubts = [one.who(guess, "192.0.2.1", 0.0) for _ in range(WRONG_PER_CLIENT + 3)]
    asked = [doubt for doubt in doubts if isinstance(doubt, Doubt)]
    assert {(doubt.stored, doubt.password) for doubt in asked} == {(stored, b"x")}
    assert len(asked) == WRONG_PER_CLIENT
    assert [status_of(answer) for answer in doubts[WRONG_PER_CLIENT:]] == [429] * 3
    assert status_of(asked[0].settle(False)) == 401
    assert asked[1].settle(True) == "ann"
    assert one.who(request(Authorization=basic("ann", "x")), "192.0.2.1", 0.0) == "ann"
    # The one that was right does not count.
    assert isinstance(one.who(request(Authorization=basic("ann", "y")), "192.0.2.1", 0.0), Doubt)
    # A user that there is not takes as long, and is never right.
    other = one.who(request(Authorization=basic("bob", "x")), "192.0.2.2", 0.0)
    assert isinstance(other, Doubt)
    assert status_of(other.settle(True)) == 401
