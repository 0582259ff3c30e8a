"""The status page in a real browser, of a running daemon, and of ten thousand made-up pairs.

    PYFORWARDER_SCREENSHOTS=docs sudo scripts/test tests/kernel/users/test_page.py -k pictures

makes the pictures of docs/page.md anew.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil
import pytest

from pyforwarder.core.address import Address
from pyforwarder.core.password import make_hash
from pyforwarder.datapath.ebpf.abi import DatapathKind
from pyforwarder.runtime.loop import Loop
from pyforwarder.runtime.slowness import scaled_s
from pyforwarder.status.gate import Gate
from pyforwarder.status.history import History
from pyforwarder.status.page_data import About
from pyforwarder.status.sampling import Sampler
from pyforwarder.status.server import Server
from pyforwarder.status.site import PageSite, read_files
from tests.helpers.browser import Browser, Page, browser
from tests.helpers.first_packets import client_hello
from tests.helpers.peers import (
    EchoServer,
    NameServer,
    dial,
    dial_through,
    ends_with_reset,
    read_exactly,
    read_to_end,
    unused_port,
)
from tests.helpers.status import CONFIG, Memory
from tests.helpers.taken_over_worker import as_worker, sequenced
from tests.helpers.waiting import DEADLINE_S, wait_for

if TYPE_CHECKING:
    from tests.helpers.daemon import Daemon
    from tests.kernel.conftest import StartForwarder

pytestmark = pytest.mark.timeout(120)

HTTP: Final = b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
NOTHING: Final = "\u2013"
# What runs where text becomes markup, in as many ways as there are.
PAYLOAD: Final = "<img/src=x/onerror=hacked=1>"
PAYLOADS: Final = (
    PAYLOAD,
    '"><script>hacked=1</script>',
    "'-hacked=1-'",
    "</textarea><svg/onload=hacked=1>",
    "javascript:hacked=1",
    "${hacked=1}{{hacked=1}}",
    "\u202e\x1b]0;hacked\x07<b>",
)


@pytest.fixture(scope="module")
def chrome(network: None) -> Iterator[Browser]:
    """One browser for all tests; each has a tab without a past."""
    del network
    with browser() as one:
        yield one


class Shown:
    """A daemon with a page, and servers behind it."""

    def __init__(self, start: StartForwarder, place: Path, *, control: bool = True) -> None:
        self.port = unused_port()
        self.dead = unused_port()
        self._servers = contextlib.ExitStack()
        self.echo = self._servers.enter_context(EchoServer())
        self.named = self._servers.enter_context(NameServer("one"))
        password = place / f"{self.port}.password"
        password.write_text("open sesame\n")
        password.chmod(0o600)
        self.config = f"""
workers: 2
datapath: sockmap
handover: {{after_bytes: 0}}
listeners:
  - name: main
    bind: 127.0.0.1:0
    rules:
      - {{name: named, match: instruction, allow: [loopback]}}
      - {{name: web, match: {{http: {{host: ["*.test"]}}}}, to: pool}}
      - {{name: tls, match: {{tls: {{}}}}, to: sni, allow: [loopback]}}
      - {{name: socks, match: socks, users: [guest], allow: [loopback]}}
      - {{name: "{PAYLOAD}", match: any, reject: reset}}
upstreams:
  "{PAYLOAD}2": {{servers: ["127.0.0.1:{self.dead}"]}}
  pool:
    servers:
      - {{address: "127.0.0.1:{self.named.address[1]}", weight: 3, backup: true}}
      - "127.0.0.1:{self.dead}"
    health: {{interval: 100ms, timeout: 80ms, fall: 1}}
users: {{guest: "{password}", "{PAYLOAD}": "{password}"}}
status: {{bind: 127.0.0.1:{self.port}, control: {str(control).lower()}}}
"""
        self.daemon: Daemon = start(self.config)
        self.url = f"http://127.0.0.1:{self.port}/"

    def pair(self) -> socket.socket:
        return dial_through(self.daemon.address, self.echo.address)

    def explained(self, first: bytes) -> dict[str, Any]:
        """What the command says."""
        done = self.daemon.command("explain", "--hex", first.hex(), "--json")
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    def close(self) -> None:
        self._servers.close()


@pytest.fixture(scope="module")
def shown(
    start_shared_forwarder: StartForwarder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shown]:
    one = Shown(start_shared_forwarder, tmp_path_factory.mktemp("page"))
    yield one
    one.close()


@contextlib.contextmanager
def opened(chrome: Browser, url: str, **how: Any) -> Iterator[Page]:
    """The page in a tab of its own, live; at the end nothing may have complained."""
    page = chrome.page(**how)
    with contextlib.closing(page):
        page.open(url)
        page.wait("document.body.dataset.state === 'live'")
        yield page
        assert page.complaints == []
        assert [one for one in page.requests if not one.startswith(url)] == []
        assert page.run("typeof hacked") == "undefined"


def cells(page: Page, table: str, row: str) -> dict[str, str]:
    """A row of a table by its headings."""
    found = page.run(
        f"""(() => {{
          const table = document.querySelector({json.dumps(table)});
          const names = [...table.querySelectorAll('thead th')].map(one => one.textContent);
          const row = [...table.querySelectorAll('tbody tr')].find(
            one => one.firstElementChild.textContent === {json.dumps(row)});
          if (row === undefined) return null;
          const texts = [...row.children].map(one => one.textContent);
          return Object.fromEntries(names.map((name, n) => [name, texts[n]]));
        }})()"""
    )
    assert isinstance(found, dict), f"no row {row}"
    return found


Rows = list[dict[str, str]]


def rows(page: Page) -> Rows:
    """The pairs that are drawn, in their order."""
    found = page.run(
        """(() => [...document.querySelectorAll('#pairs-space [role=row]')]
          .sort((a, b) => a.getAttribute('aria-rowindex') - b.getAttribute('aria-rowindex'))
          .map(row => Object.fromEntries([...row.children].map(
            cell => [cell.className.replace('cell ', ''), cell.textContent]))))()"""
    )
    assert isinstance(found, list)
    return found


def wait_for_rows(
    page: Page, wanted: Callable[[list[dict[str, str]]], bool]
) -> list[dict[str, str]]:
    def look() -> list[dict[str, str]] | None:
        found = rows(page)
        return found if wanted(found) else None

    return wait_for(look, "these rows") or []


def test_known_traffic_is_shown_live(chrome: Browser, shown: Shown) -> None:
    with opened(chrome, shown.url) as page, contextlib.ExitStack() as stack:
        before = int(cells(page, "#listeners table", "main")["Accepted"])
        socks = [stack.enter_context(shown.pair()) for _ in range(3)]
        ports = [str(sock.getsockname()[1]) for sock in socks]
        for sock, size in zip(socks, (5003, 70_001, 1), strict=True):
            sock.sendall(b"x" * size)
            assert len(read_exactly(sock, size)) == size
        found = wait_for_rows(page, lambda found: len(found) == 3)
        assert sorted(row["client"].rpartition(":")[2] for row in found) == sorted(ports)
        assert {row["rule"] for row in found} == {"named"}
        assert {row["datapath"] for row in found} == {"sockmap"}
        # The exact numbers are where a pair is chosen.
        page.run(f"document.querySelector('#filter').value = ':{ports[1]}'")
        page.run("document.querySelector('#filter').dispatchEvent(new Event('input'))")
        page.wait_for_text("#pairs-count", "1 of 3 pairs")
        wait_for_rows(page, lambda found: len(found) == 1)
        page.click("#pairs-space [role=row]")
        details = page.wait_for_text("#pair-details", f":{ports[1]} > 127.0.0.1:")
        assert "rule named of main; up 68.4 KiB, down 68.4 KiB" in details
        page.wait("document.querySelector('#totals dd').textContent === '3'")
        assert int(cells(page, "#listeners table", "main")["Accepted"]) == before + 3
        assert cells(page, "#rules table", "named")["Pairs"] == "3"
        assert cells(page, "#lanes", "sockmap")["Pairs"] == "3"
        assert page.text("[data-lane=sockmap] .count") == "3 pairs"
        # What flows is on its lane, in the charts, and gone when it stops.
        stop = threading.Event()

        def pump() -> None:
            while not stop.wait(0.02):
                socks[0].sendall(b"y" * 20_000)
                read_exactly(socks[0], 20_000)

        thread = threading.Thread(target=pump)
        thread.start()
        try:
            page.wait_for_text("[data-lane=sockmap] .rate.up", "KiB/s")
            assert "KiB/s" in cells(page, "#lanes", "sockmap")["Down"]
            assert cells(page, "#lanes", "copy")["Up"] == NOTHING
            page.wait("document.querySelector('#listeners .chart .up').getAttribute('d') !== ''")
        finally:
            stop.set()
            thread.join()
        page.wait("document.querySelector('[data-lane=sockmap] .rate.up').textContent === ''")
        for sock in socks:
            sock.shutdown(socket.SHUT_WR)
            assert read_to_end(sock) == b""
        page.wait_for_text("#pairs-count", "0 pairs")
        assert int(cells(page, "#ends table", "finished")["Since the start"]) >= 3


# The number of a server's row, from 1.
ROW: Final = """[...document.querySelectorAll('#servers tbody tr')].findIndex(
  one => one.firstElementChild.textContent === %s) + 1"""


def test_health_is_shown_and_a_server_is_drained(chrome: Browser, shown: Shown) -> None:
    with opened(chrome, shown.url) as page:
        dead, good = f"127.0.0.1:{shown.dead}", f"127.0.0.1:{shown.named.address[1]}"
        page.wait_for_text("#health", f"pool {dead} down: TCP: Connection refused")
        state = "[...document.querySelectorAll('#servers tbody tr')].map(one => one.innerText)"
        page.wait(f"{state}.some(one => one.includes({json.dumps(dead)}) && /down/.test(one))")
        assert cells(page, "#servers", good)["State"] == "up"
        assert cells(page, "#servers", good)["Weight"] == "3, backup"
        with dial(shown.daemon.address) as sock:
            sock.sendall(HTTP)
            assert b"one" in sock.recv(100)
        page.wait("document.querySelector('#rules').innerText.includes('web')")
        wait_for(lambda: cells(page, "#rules table", "web")["Taken"] == "1", "the rule is counted")
        wait_for(lambda: cells(page, "#servers", good)["Connects"] == "1", "the server is")
        row = page.run(ROW % json.dumps(good))
        button = f"#servers tbody tr:nth-child({row}) button"
        for word, state, becomes in (("Drain", "drained", "Ready"), ("Ready", "up", "Drain")):
            assert page.text(button) == word
            page.click(button)
            page.wait_for_text(f"#servers tbody tr:nth-child({row}) td:nth-child(4)", state)
            page.wait_for_text(button, becomes)
        shown.daemon.wait_for_line(f"server_set_by_page user=- server=pool/{good} state=ready")


def test_pairs_are_ordered_filtered_chosen_and_reset_with_the_keyboard(
    chrome: Browser, shown: Shown
) -> None:
    with opened(chrome, shown.url) as page, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(shown.pair()) for _ in range(5)]
        ids = sorted(row["id"] for row in shown.daemon.pairs())
        page.wait_for_text("#pairs-count", "5 pairs")
        seen: list[str] = []
        while not seen or (seen[-1] != "BODY" and len(seen) < 60):
            page.press("Tab")
            seen.append(page.focused())
            if seen[-1] == "pairs-table":
                break
        for expected in ("A To the pairs", "pause", "A Explain", "filter", "sort", "order"):
            assert any(one.startswith(expected) for one in seen), (expected, seen)
        assert seen[-1] == "pairs-table"
        page.run("document.querySelector('[data-order=id]').focus()")
        page.press("Enter")
        found = wait_for_rows(page, lambda found: found[0]["id"] == str(ids[-1]))
        assert [int(row["id"]) for row in found] == ids[::-1]
        assert (
            page.run("document.querySelector('[aria-sort]').getAttribute('aria-sort')")
            == "descending"
        )
        page.press("Enter")
        wait_for_rows(page, lambda found: [int(row["id"]) for row in found] == ids)
        page.run("document.querySelector('#pairs-table').focus()")
        page.press("ArrowDown", times=3)
        page.wait_for_text("#pair-details", f"Pair {ids[2]}:")
        active = "document.querySelector('#pairs-table').getAttribute('aria-activedescendant')"
        assert page.run(active) == f"pair-{ids[2]}"
        page.press("End")
        page.wait_for_text("#pair-details", f"Pair {ids[4]}:")
        page.press("Home")
        details = page.wait_for_text("#pair-details", f"Pair {ids[0]}:")
        # Enter is on the harmless side.
        page.press("Delete")
        page.wait_for_text("#ask-words", f"Reset pair {ids[0]},")
        page.press("Enter")
        page.wait("!document.querySelector('#ask').open")
        page.press("Delete")
        page.wait("document.querySelector('#ask').open")
        page.press("Tab")
        page.press("Enter")
        page.wait_for_text("#said", f"pair {ids[0]} reset")
        page.wait_for_text("#pairs-count", "4 pairs")
        left = {row["id"] for row in shown.daemon.pairs()}
        assert left == set(ids[1:])
        port = int(details.split()[2].rpartition(":")[2])
        client = next(sock for sock in socks if sock.getsockname()[1] == port)
        assert ends_with_reset(client) == b""
        page.wait_for_text("#ends", "flushed")
        shown.daemon.wait_for_line(r"flushed_by_page user=- pairs=1")


ASKED_AGAIN_BEFORE_THE_FIRST_IS_CLOSED: Final = """(() => {
  const table = document.querySelector('#pairs-table');
  const key = () => table.dispatchEvent(new KeyboardEvent('keydown', {key: 'Delete'}));
  const dialog = document.querySelector('#ask');
  const closed = new Promise(resolve => dialog.addEventListener('close', resolve, {once: true}));
  table.dispatchEvent(new KeyboardEvent('keydown', {key: 'Home'}));
  key();
  dialog.querySelector('[value=%s]').click();
  table.dispatchEvent(new KeyboardEvent('keydown', {key: 'End'}));
  key();
  return closed.then(() => dialog.open);
})()"""


@pytest.mark.parametrize("first", ["yes", "no"])
def test_a_question_is_answered_by_its_own_dialog(
    chrome: Browser, shown: Shown, first: str
) -> None:
    """A dialog's close event comes later than its end; the next question may be open by then."""
    with opened(chrome, shown.url) as page, shown.pair(), shown.pair():
        page.wait_for_text("#pairs-count", "2 pairs")
        page.run("document.querySelector('[data-order=id]').focus()")
        page.press("Enter", times=2)
        ids = sorted(row["id"] for row in shown.daemon.pairs())
        wait_for_rows(page, lambda found: [int(row["id"]) for row in found] == ids)
        assert page.run(ASKED_AGAIN_BEFORE_THE_FIRST_IS_CLOSED % first) is True
        assert page.text("#ask-words").startswith(f"Reset pair {ids[1]},")
        left = ids if first == "no" else ids[1:]
        wait_for(lambda: sorted(row["id"] for row in shown.daemon.look()) == left, "the first")
        page.click("#ask [value=yes]")
        page.wait_for_text("#said", f"pair {ids[1]} reset")
        wait_for(
            lambda: sorted(row["id"] for row in shown.daemon.look()) == left[:-1], "the second"
        )
    wait_for(lambda: not shown.daemon.look(), "no pair is left")


def explain(page: Page, text: str, *, is_hex: bool = False) -> str:
    """Fill in the form, and the verdict."""
    page.run("document.querySelector('#explain-verdict').textContent = ''")
    page.click(f"input[name=form][value={'hex' if is_hex else 'text'}]")
    page.run(f"document.querySelector('#explain-bytes').value = {json.dumps(text)}")
    page.click("#explain-form [type=submit]")
    return str(page.wait("document.querySelector('#explain-verdict').textContent"))


def test_explain_answers_as_the_command_does(chrome: Browser, shown: Shown) -> None:
    with opened(chrome, shown.url) as page:
        text = "18127.0.0.1:900100"
        said = json.loads(
            shown.daemon.command("explain", "--hex", text.encode().hex(), "--json").stdout
        )
        verdict = explain(page, text)
        assert (
            f"Rule named takes it after {said['after_bytes']} of 18 bytes, to 127.0.0.1:9001"
            in verdict
        )
        assert said["why"] in verdict
        for rule in said["rules"]:
            shown_rule = cells(page, "#explain-rules", rule["rule"])
            assert shown_rule["After byte"] == str(rule["after_bytes"])
            assert shown_rule["Why"] == rule["why"]
        assert page.text("#explain-dump mark").split() == [f"{byte:02x}" for byte in text.encode()]
        assert "to pool" in explain(page, "GET / HTTP/1.1\nHost: a.test\n\n")
        assert "Undecided" in explain(page, "GET / HT")
        assert "Rule tls takes it" in explain(
            page, client_hello(b"localhost").hex(":"), is_hex=True
        )
        assert "no name is resolved" in page.text("#explain-verdict")
        assert "\\ at 3" in explain(page, "ab\\q")
        assert "hexadecimal" in explain(page, "0x", is_hex=True)
        # The right password of a rule is as wrong as any here: nobody can try them out.
        greeting = b"\x05\x01\x02\x01\x05guest\x0bopen sesame"
        assert shown.explained(greeting)["outcome"] == "need-more"
        assert "refuses it" in explain(page, greeting.hex(), is_hex=True)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_clients_say_is_text(chrome: Browser, shown: Shown, payload: str) -> None:
    said = payload.encode()
    hello = client_hello(said)
    firsts = (
        hello,
        b"GET /"
        + said
        + b" HTTP/1.1\r\nHost: "
        + said
        + b".test\r\nUser-Agent: "
        + said
        + b"\r\n\r\n",
        b"CONNECT " + said + b":80 HTTP/1.1\r\nHost: " + said + b"\r\n\r\n",
        b"%02d%b00" % (len(said) + 7, said + b":80"),
        b"\x05\x01\x02\x01" + bytes([len(said)]) + said + bytes([len(said)]) + said,
        b"\x04\x01\x00\x50\x00\x00\x00\x01" + said + b"\0" + said + b"\0",
        said,
    )
    for first in firsts:
        with dial(shown.daemon.address) as sock, contextlib.suppress(OSError):
            sock.sendall(first)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(4096)
    with opened(chrome, shown.url) as page:
        for first in firsts:
            assert explain(page, first.hex(), is_hex=True)
        explain(page, payload.replace("\\", "\\\\"))
        page.type("#filter", payload)
        page.type("#explain-client", payload)
        page.click("#explain-form [type=submit]")
        page.wait_for_text("#pairs-count", "0 pairs")
        # Also names from the configuration.
        assert cells(page, "#rules table", PAYLOAD)["To"] == "(reset)"
        assert page.text("#servers tbody").count(PAYLOAD) == 1
        assert page.text("#sums tbody").count(PAYLOAD) == 1
        assert page.run("document.querySelectorAll('img, script:not([src]), b').length") == 0


WANT_A_NAME: Final = frozenset(
    {"button", "link", "searchbox", "textbox", "combobox", "grid", "image", "table", "region"}
)


def test_the_page_tells_a_screen_reader_what_it_is(chrome: Browser, shown: Shown) -> None:
    with opened(chrome, shown.url) as page, shown.pair():
        page.wait_for_text("#pairs-count", "1 pair")
        told = page.accessible()
        headings = [name for role, name in told if role == "heading"]
        assert headings[:3] == ["pyforwarder default", "Now", "Who touches the bytes"]
        unnamed = [
            role
            for role, name in told
            if role
            in {"button", "link", "searchbox", "textbox", "combobox", "grid", "image", "table"}
            and not name.strip()
        ]
        assert unnamed == []
        assert ("grid", "Pairs") in told
        assert ("gridcell", "joined") in told
        # What is read out by itself: how the connection goes, and what came of orders. No numbers.
        live = "[...document.querySelectorAll('[role=status],[role=alert],[aria-live],output')]"
        assert page.run(f"{live}.map(one => one.id)") == [
            *("connection", "pairs-count", "explain-verdict", "said")
        ]
        page.run(
            "window.changes = 0; new MutationObserver(() => window.changes++).observe("
            "document.querySelector('#connection'), {childList: true, subtree: true})"
        )
        page.wait("document.querySelector('#about').textContent", deadline_s=5)
        assert page.run("window.changes") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_telephone(chrome: Browser, shown: Shown, scheme: str) -> None:
    with opened(chrome, shown.url, width=360, height=740) as page, shown.pair():
        page.prefer(color_scheme=scheme, reduced_motion="reduce")
        page.wait_for_text("#pairs-count", "1 pair")
        assert page.run("document.documentElement.scrollWidth") == 360
        wait_for_rows(page, lambda found: len(found) == 1)
        out = page.run(
            """[...document.querySelectorAll('#pairs-space .cell')].filter(cell => {
              const where = cell.getBoundingClientRect();
              return where.width && (where.left < 0 || where.right > 360);
            }).length"""
        )
        assert out == 0
        style = "getComputedStyle(document.body)"
        text, ground = page.run(f"[{style}.color, {style}.backgroundColor]")
        assert (_luminance(text) < _luminance(ground)) == (scheme == "light")
        assert page.run(
            "[...document.querySelectorAll('.flow .line')].every("
            "one => getComputedStyle(one).animationName === 'none')"
        )
        for selector in (
            "h1",
            "#about",
            "#pairs-count",
            ".cell.state",
            "figcaption",
            "td",
            "th",
            "a",
        ):
            ratio = page.run(CONTRAST % json.dumps(selector))
            assert ratio >= 4.5, (selector, ratio)  # WCAG 2.1, AA


# The contrast of an element's text with what is behind it.
CONTRAST: Final = """((selector) => {
  const light = (text) => {
    const [r, g, b] = text.match(/[0-9.]+/g).map((one) => {
      const part = one / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const one = document.querySelector(selector);
  const ground = (node) => getComputedStyle(node).backgroundColor;
  let behind = one;
  while (ground(behind) === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
  const both = [light(getComputedStyle(one).color), light(ground(behind))];
  return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
})(%s)"""


def _luminance(color: str) -> float:
    return sum(float(part) for part in color.strip("rgba()").split(",")[:3])


def test_nobody_is_asked_by_a_page_that_is_paused_or_hidden(chrome: Browser, shown: Shown) -> None:
    def watched() -> bool:
        """Whether a viewer's connection is open."""
        connections = psutil.Process(shown.daemon.process.pid).children(recursive=True)
        return any(
            one.laddr.port == shown.port and one.status == "ESTABLISHED"
            for child in connections
            for one in child.net_connections()
        )

    with opened(chrome, shown.url) as page:
        assert watched()
        page.click("#pause")
        page.wait_for_text("#connection", "paused")
        assert page.run("document.querySelector('#pause').getAttribute('aria-pressed')") == "true"
        wait_for(lambda: not watched(), "nobody looks")
        page.click("#pause")
        page.wait("document.body.dataset.state === 'live'")
        page.run(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        page.wait("document.body.dataset.state === 'hidden'")
        wait_for(lambda: not watched(), "nobody looks")
        page.run("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
        page.wait("document.body.dataset.state === 'live'")


def test_a_reload_is_seen(chrome: Browser, shown: Shown) -> None:
    page = chrome.page()
    with contextlib.closing(page):
        page.open(shown.url)
        page.wait("document.body.dataset.state === 'live'")
        shown.daemon.reconfigure(shown.config.replace("name: socks", "name: changed"))
        assert shown.daemon.command("reload").returncode == 0
        page.wait_for_text("#rules table", "changed")
        page.wait("document.body.dataset.state === 'live'")
        shown.daemon.reconfigure(shown.config)
        assert shown.daemon.command("reload").returncode == 0
        page.wait("!document.querySelector('#rules table').textContent.includes('changed')")
        assert not [one for one in page.complaints if "ERR_" not in one]


# ---------------------------------------------------------------- who means ill


HOSTILE: Final = """<!doctype html><meta charset=utf-8><title>evil</title><body><script>
window.got = [];
const url = "URL";
const note = (name, value) => window.got.push(name + ": " + value);
const attempts = [
  fetch(url + "pairs").then(r => r.text()).then(t => note("read pairs", t.slice(0, 20)), () => 0),
  fetch(url + "live").then(() => note("read live", 1), () => 0),
  fetch(url + "flush", {method: "POST", mode: "no-cors", body: '{"ids":[IDS]}'}).catch(() => 0),
  fetch(url + "flush", {method: "POST", mode: "no-cors", headers: {"Content-Type": "text/plain"},
    credentials: "include", body: '{"listener":"main"}'}).catch(() => 0),
  fetch(url + "flush", {method: "POST", headers: {"Content-Type": "application/json",
    "X-Pyforwarder-Token": "guess"}, body: '{"ids":[IDS]}'}).then(() => note("flush", 1), () => 0),
  new Promise(done => { const e = new EventSource(url + "live");
    e.onmessage = e.onopen = () => { note("events", 1); done(); };
    e.onerror = () => { e.close(); done(); }; }),
  import(url + "app.js").then(() => note("script", 1), () => 0),
  new Promise(done => { const f = document.createElement("iframe"); f.src = url; f.onload = done;
    document.body.append(f); }),
  new Promise(done => { const f = document.createElement("form"); f.method = "POST";
    f.action = url + "flush"; f.enctype = "text/plain"; f.target = "sink";
    const i = document.createElement("input"); i.name = '{"ids":[IDS],"x":"'; i.value = '"}';
    f.append(i); const s = document.createElement("iframe"); s.name = "sink"; s.onload = done;
    document.body.append(s, f); f.submit(); setTimeout(done, 500); }),
];
Promise.allSettled(attempts).then(() => { window.finished = true; });
</script>"""


def test_a_page_of_somebody_else_reads_and_does_nothing(chrome: Browser, shown: Shown) -> None:
    with shown.pair() as sock:
        (row,) = shown.daemon.pairs()
        html = HOSTILE.replace("URL", shown.url).replace("IDS", str(row["id"])).encode()

        class Evil(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(html)

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            try:
                page = chrome.page()
                page.open(f"http://127.0.0.1:{server.server_port}/")
                page.wait("window.finished")
                assert page.run("window.got") == []
                # The frame shows the browser's own error, and not the page.
                frames = page.call("Page.getFrameTree")["frameTree"]["childFrames"]
                assert shown.url not in [one["frame"]["url"] for one in frames]
                page.close()
            finally:
                server.shutdown()
        assert [one["id"] for one in shown.daemon.pairs()] == [row["id"]]
        sock.sendall(b"still here")
        assert read_exactly(sock, 10) == b"still here"


def ask(port: int, method: str, target: str, body: str = "", **headers: str) -> tuple[int, bytes]:
    """A request by hand: status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=scaled_s(10))
    try:
        connection.request(
            method, target, body or None, {name.replace("_", "-"): v for name, v in headers.items()}
        )
        answer = connection.getresponse()
        return answer.status, answer.read(1 << 20)
    finally:
        connection.close()


def test_a_name_that_leads_here_is_not_the_page(shown: Shown) -> None:
    assert ask(shown.port, "GET", "/", Host="evil.example")[0] == 421
    assert ask(shown.port, "GET", "/pairs", Host=f"evil.example:{shown.port}")[0] == 421
    assert ask(shown.port, "GET", "/pairs", Host="localhost:1")[0] == 200


def test_a_client_of_the_forwarder_does_not_get_to_the_page(shown: Shown) -> None:
    # The page asks who comes from this host for no password, and it is the forwarder that would.
    for destination in (f"127.0.0.1:{shown.port}", f"localhost:{shown.port}"):
        text = f"{len(destination) + 4:02d}{destination}00".encode()
        with dial(shown.daemon.address) as sock:
            sock.sendall(text + b"GET / HTTP/1.0\r\n\r\n")
            assert read_to_end(sock) == b"14ERR denied83"


def test_a_viewer_gives_name_and_password(
    chrome: Browser, start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    port = unused_port()
    secret = tmp_path / "secret"
    secret.write_text(f"{make_hash(b'correct horse')}\n")
    secret.chmod(0o600)
    forwarder = start_forwarder(
        f"status: {{bind: 0.0.0.0:{port}, users: [ann], control: true}}\n"
        f"users: {{ann: {secret}, bob: {secret}}}\ndatapath: copy\n"
    )
    for path in ("/", "/app.js", "/live", "/pairs"):
        assert ask(port, "GET", path)[0] == 401
    for word in ("YW5uOnRyeQ==", "Ym9iOmNvcnJlY3QgaG9yc2U=", "x"):  # ann:try, bob's own
        assert ask(port, "GET", "/pairs", Authorization=f"Basic {word}")[0] == 401
    codes = [ask(port, "GET", "/", Authorization="Basic YW5uOg==")[0] for _ in range(10)]
    assert codes == [401] * 3 + [429] * 7
    page = chrome.page()
    page.login("ann", "correct horse")
    page.open(f"http://127.0.0.1:{port}/")
    # The same address has guessed too often.
    page.wait("document.body.innerText.includes('Too many wrong passwords')")
    wait_for(lambda: ask(port, "GET", "/")[0] == 401, "it answers")
    forwarder.command("reload")  # another process, that knows of no guesses
    page.open(f"http://127.0.0.1:{port}/")
    page.wait("document.body.dataset.state === 'live'")
    with EchoServer() as server, dial_through(forwarder.address, server.address):
        page.wait_for_text("#pairs-count", "1 pair")
        page.run("document.querySelector('#pairs-table').focus()")
        page.press("ArrowDown")
        page.press("Delete")
        page.wait("document.querySelector('#ask').open")
        page.click("#ask .danger")
        forwarder.wait_for_line(r"flushed_by_page user=ann pairs=1")
    page.close()


def test_a_flood_of_wrong_logins_keeps_out_no_client_from_elsewhere(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    port = unused_port()
    secret = tmp_path / "secret"
    secret.write_text(f"{make_hash(b'correct horse')}\n")
    secret.chmod(0o600)
    start_forwarder(
        f"status: {{bind: 127.0.0.1:{port}, users: [ann]}}\nusers: {{ann: {secret}}}\n"
        "datapath: copy\n"
    )
    wait_for(lambda: ask(port, "GET", "/")[0] == 401, "it answers")

    def begin(host: str, word: str) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port), DEADLINE_S, source_address=(host, 0))
        sock.sendall(
            f"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic {word}\r\n\r\n".encode()
        )
        return sock

    def enters(host: str) -> bool:
        """Whether the right password gets in; on a slow machine it may be told to come again."""
        for _ in range(4):
            with begin(host, "YW5uOmNvcnJlY3QgaG9yc2U=") as sock:
                said = sock.recv(12)
            assert said in (b"HTTP/1.1 200", b"HTTP/1.1 503")
            if said == b"HTTP/1.1 200":
                return True
        return False

    with contextlib.ExitStack() as stack:

        def flood() -> None:
            """Three times as many as there are connections, none of which is read or closed."""
            for number in range(200):
                stack.enter_context(begin(f"127.0.0.{number % 100 + 100}", "YW5uOnRyeQ=="))

        flood()
        assert enters("127.9.0.2")
        # A known person is answered before any of those is looked at, at any address.
        flood()
        assert enters("127.0.0.100")


def web_process(forwarder: Daemon, port: int) -> psutil.Process:
    """The process that listens there."""

    def look() -> psutil.Process | None:
        for child in psutil.Process(forwarder.process.pid).children():
            with contextlib.suppress(psutil.Error):
                listening = [c.laddr.port for c in child.net_connections() if c.status == "LISTEN"]
                if port in listening:
                    return child
        return None

    found = wait_for(look, "the process of the page")
    assert found is not None
    return found


def serves(process: psutil.Process) -> bool:
    """Whether it has given up what it has inherited: before that, no stranger's byte."""
    if process.uids().real == 0:
        return False
    return bool(as_worker(process, lambda fds: len(sequenced(fds)) == 1))


def test_a_page_that_is_taken_over_orders_nothing_it_may_not(
    start_forwarder: StartForwarder, tmp_path: Path
) -> None:
    shown = Shown(start_forwarder, tmp_path, control=False)
    with contextlib.closing(shown), shown.pair() as sock:
        (row,) = shown.daemon.pairs()
        order = json.dumps({"flush": [row["id"]], "n": 1, "user": "root"}).encode()
        for data in (order, b'{"do":"down"}', b"[" * 50_000):
            process = web_process(shown.daemon, shown.port)
            wait_for(lambda one=process: serves(one), "it serves")  # type: ignore[misc]

            def say(fds: Any, data: bytes = data) -> int:
                channels = sequenced(fds)
                for channel in channels:
                    channel.send(data)
                return len(channels)

            assert as_worker(process, say) == 1
            wait_for(lambda gone=process: not gone.is_running(), "it is ended")  # type: ignore[misc]
        shown.daemon.wait_for_line("web_fault", count=3)
        assert ask(shown.port, "GET", "/pairs")[0] == 200
        assert ask(shown.port, "POST", "/flush", json.dumps({"ids": [row["id"]]}))[0] in (403, 415)
        sock.sendall(b"still here")
        assert read_exactly(sock, 10) == b"still here"


# ---------------------------------------------------------------- ten thousand


class Crowd:
    """The page of ten thousand pairs that are in memory only, served by a thread."""

    def __init__(self) -> None:
        self.memory = Memory(slots=8192)
        for number in range(1, 10_001):
            worker = number % 2
            slot = self.memory.pair(
                number,
                worker=worker,
                client=f"10.{number >> 8}.{number & 255}.7",
                server=Address(f"10.0.0.{1 + number % 2}", 443),
                rule="tls" if number % 4 else "rest",
                datapath=DatapathKind.SPLICE if number % 3 else DatapathKind.SOCKMAP,
            )
            self.memory.carry(slot, number, number, worker=worker)
        self.loop = Loop()
        self.sock = socket.create_server(("127.0.0.1", 0))
        memory = self.memory
        site = PageSite(
            self.loop,
            About("crowd", "0.2.0", 0.0, 2, {"splice": "available"}, CONFIG, control=False),
            Sampler(memory.plan, memory.counters, memory.windows),
            History(memory.plan),
            Gate(),
            None,
            files=read_files(),
            unix_time_s=lambda: 1e9 + self.loop.now_s,
        )
        self.server = Server(self.loop, self.sock, site)
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}/"
        self.thread = threading.Thread(target=self.loop.run)
        self.thread.start()

    def close(self) -> None:
        self.loop.stop()
        self.thread.join()
        self.server.close_all()
        self.sock.close()
        self.loop.dispose()


def test_ten_thousand_pairs_are_a_screen_at_a_time(chrome: Browser) -> None:
    with contextlib.closing(Crowd()) as crowd, opened(chrome, crowd.url) as page:
        page.wait_for_text("#pairs-count", "10 000 pairs")
        page.run(
            "document.querySelector('#sort').value = 'id';"
            "document.querySelector('#sort').dispatchEvent(new Event('change'))"
        )
        page.click("#order")
        wait_for_rows(page, lambda found: bool(found) and found[0]["id"] == "1")
        height = page.run("document.querySelector('#pairs-space').offsetHeight")
        assert height == 28 * 10_000
        page.run("document.querySelector('#pairs-view').scrollTop = 28 * 5000")
        found = wait_for_rows(page, lambda found: bool(found) and found[0]["id"] == "5001")
        assert found[0]["client"].startswith("10.19.137.7:")
        page.run("document.querySelector('#pairs-table').focus()")
        page.press("End")
        page.wait_for_text("#pair-details", "Pair 10000:")
        assert rows(page)[-1]["id"] == "10000"
        page.press("PageUp")
        page.wait("!document.querySelector('#pair-details').textContent.includes('Pair 10000:')")
        page.type("#filter", "rest sockmap 10.39.")
        page.wait_for_text("#pairs-count", " of 10 000 pairs")
        expected = [n for n in range(1, 10_001) if not n % 12 and n >> 8 == 39]
        found = wait_for_rows(
            page, lambda found: bool(found) and found[0]["id"] == str(expected[0])
        )
        assert page.text("#pairs-count") == f"{len(expected)} of 10 000 pairs"
        page.type("#filter", "")
        page.wait_for_text("#pairs-count", "10 000 pairs")
        # Neither the document nor what is sent grows with the number of pairs.
        for _ in range(40):
            page.run("document.querySelector('#pairs-view').scrollTop = 280000 * Math.random()")
            page.run("new Promise(requestAnimationFrame)")
        assert page.run("document.querySelectorAll('#pairs-space [role=row]').length") <= 40
        sizes = page.run(
            "performance.getEntriesByType('resource').filter(one => one.name.includes('pairs?'))"
            ".map(one => one.transferSize)"
        )
        assert sizes
        assert max(sizes) < 48 * 1024


def test_more_viewers_than_can_be_served_are_told_so(chrome: Browser) -> None:
    with contextlib.closing(Crowd()) as crowd, contextlib.ExitStack() as stack:
        port = crowd.sock.getsockname()[1]
        for _ in range(16):
            sock = stack.enter_context(dial(("127.0.0.1", port)))
            sock.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(12) == b"HTTP/1.1 200"
        page = chrome.page()
        page.open(crowd.url)
        page.wait("document.body.dataset.state === 'lost'")
        stack.close()
        page.wait("document.body.dataset.state === 'live'")
        page.close()


# ---------------------------------------------------------------- pictures


def test_pictures_for_the_documents(chrome: Browser, shown: Shown, tmp_path: Path) -> None:
    """What docs/page.md shows; PYFORWARDER_SCREENSHOTS says where to put it."""
    where = Path(os.environ.get("PYFORWARDER_SCREENSHOTS") or tmp_path)
    with opened(chrome, shown.url) as page, contextlib.ExitStack() as stack:
        socks = [stack.enter_context(shown.pair()) for _ in range(12)]
        stop = threading.Event()

        def pump() -> None:
            turn = 0
            while not stop.wait(0.02):
                turn += 1
                for number, sock in enumerate(socks[:8]):
                    size = 1 << (number + 6)
                    sock.sendall(b"z" * size)
                    read_exactly(sock, size)
                with dial(shown.daemon.address) as sock, contextlib.suppress(OSError):
                    sock.sendall(
                        b"nonsense\r\n" if turn % 2 else b"GET / HTTP/1.1\r\nHost: a.test\r\n\r\n"
                    )
                    sock.recv(100)

        thread = threading.Thread(target=pump)
        thread.start()
        try:
            wide = bool(os.environ.get("PYFORWARDER_SCREENSHOTS"))
            points = 8 if wide else 1
            page.wait(
                "document.querySelector('#total-chart .up').getAttribute('d').split('V').length"
                f" > {points + 1}",
                deadline_s=scaled_s(90),
            )
            page.resize(1000, 1100)
            page.run("window.scrollTo(0, 0)")
            page.screenshot(where / "page.png")
            page.prefer(color_scheme="dark")
            page.resize(360, 740)
            page.run("document.querySelector('#bytes').scrollIntoView()")
            page.run("new Promise(done => setTimeout(done, 300))")
            page.screenshot(where / "page-narrow.png")
        finally:
            stop.set()
            thread.join()
    for name in ("page.png", "page-narrow.png"):
        assert 5_000 < (where / name).stat().st_size < 150 * 1024
