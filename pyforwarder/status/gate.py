"""Who may ask the page's server: the browser's part first, then the person's.

Pure: the time is passed in. A browser runs pages of strangers beside ours, so that a request comes
from it proves nothing; what each check is for is said where it stands.

Source: RFC 7617 (Basic), RFC 6585 (429), https://www.w3.org/TR/fetch-metadata/.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import math
import secrets
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

from pyforwarder.core.password import is_hash, verify
from pyforwarder.status.allowance import Budget, PerClient, network_of
from pyforwarder.status.http import Answer

if TYPE_CHECKING:
    from pyforwarder.status.http import Request

TOKEN_HEADER: Final = "X-Pyforwarder-Token"
# A client's wrong passwords: so many at once, and then one in so many seconds. There is no such
# bound on all clients together: it would keep out people who know the right one.
WRONG_PER_CLIENT: Final = 5
_REFILL_PER_CLIENT_S: Final = 10.0
# Passwords that are compared at once, of all clients together; the next ones are compared beside
# the loop, at the pace that `LoginQueue` keeps.
AT_ONCE_IN_ALL: Final = 20
_AT_ONCE_EVERY_S: Final = 1.0
# A client that was wrong within this time waits behind those that were not.
SUSPECT_S: Final = 600.0
_CHALLENGE: Final = ("WWW-Authenticate", 'Basic realm="pyforwarder", charset="UTF-8"')


class Doubt(NamedTuple):
    """A password that has to be compared, and not here: with a hash, or after many others.

    `settle` takes the result, and gives the user or what to answer; `drop` is called in its place
    when the answer is not needed any more: the attempt was none.
    """

    stored: bytes
    password: bytes
    host: str
    client: str  # one client may not fill the queue of those that wait
    is_suspect: bool  # this client was wrong a short while ago
    settle: Callable[[bool], str | Answer]
    drop: Callable[[], None]


class _Attempts:
    """What is remembered of a client's logins."""

    __slots__ = ("budget", "wrong_s")

    def __init__(self) -> None:
        self.budget = Budget(WRONG_PER_CLIENT, _REFILL_PER_CLIENT_S)
        self.wrong_s = -math.inf  # when it was wrong last


class Gate:
    """Lets requests in, or says what to answer."""

    def __init__(
        self, *, hosts: Collection[str] = (), passwords: Mapping[str, bytes] | None = None
    ) -> None:
        """`hosts` are names that the page has, `passwords` those of its users, or their hashes.

        Without any nobody is asked for a name.
        """
        self._hosts = frozenset({"localhost", *hosts})
        self._passwords = {name.encode(): stored for name, stored in (passwords or {}).items()}
        # What the password of an unknown user is compared with, in vain: it must take as long.
        every = self._passwords.values()
        self._decoy = next(filter(is_hash, every), secrets.token_bytes(32))
        self._known: dict[bytes, str] = {}  # digest of name and password -> name
        self._secret = secrets.token_bytes(32)
        self._at_once = Budget(AT_ONCE_IN_ALL, _AT_ONCE_EVERY_S)
        self._clients = PerClient(_Attempts)
        # What only a page that may read our answers can know.
        self.token = secrets.token_urlsafe(24)

    def refuses_browser(self, request: Request) -> Answer | None:
        """What to answer a request that another site's page may have caused; None: it is fine.

        Asked first: before a password, so that no such page can make a browser's user be asked.
        """
        if not self._is_our_host(request.header("Host")):
            # A name of a stranger's that leads here (DNS rebinding): its pages are of one origin
            # with us. An address in its place is no name, and cannot be made to lead elsewhere.
            return Answer.words(
                HTTPStatus.MISDIRECTED_REQUEST,
                "This page has no such name: use its address, or put the name into `status.hosts`.",
            )
        site = request.header("Sec-Fetch-Site")
        if site in ("", "none", "same-origin"):
            return None
        # A link from elsewhere may lead to the page, and to nothing else.
        is_link = request.header("Sec-Fetch-Mode") == "navigate"
        if is_link and request.method == "GET" and request.path == "/":
            return None
        return Answer.words(HTTPStatus.FORBIDDEN, "Another page must not ask here.")

    def refuses_order(self, request: Request) -> Answer | None:
        """Return the answer to a request that does something or takes long, if it does not come
        from our own page; else None.
        """
        origin, host = request.header("Origin").lower(), request.header("Host").lower()
        if origin and origin not in (f"http://{host}", f"https://{host}"):
            return Answer.words(HTTPStatus.FORBIDDEN, "Another page must not ask here.")
        # A form of another page cannot have this type without asking first, nor set a header.
        if request.header("Content-Type").partition(";")[0].strip().lower() != "application/json":
            return Answer.words(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "This takes application/json.")
        if not hmac.compare_digest(request.header(TOKEN_HEADER).encode(), self.token.encode()):
            return Answer.words(
                HTTPStatus.FORBIDDEN, "The page is of an earlier time: load it again."
            )
        return None

    def _is_our_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in self._hosts
        return True

    def who(self, request: Request, host: str, now_s: float) -> str | Answer | Doubt:
        """The user that asks, empty where no login is needed, or what to answer."""
        if not self._passwords:
            return ""
        credentials = _credentials(request.header("Authorization"))
        if credentials is None:
            return Answer.words(HTTPStatus.UNAUTHORIZED, "Who are you?", _CHALLENGE)
        name, password = credentials
        # So that only the first request of a browser takes long. Not the password itself: nobody
        # has to find that in our memory.
        digest = hmac.digest(self._secret, b"%d:%b%b" % (len(name), name, password), "sha256")
        known = self._known.get(digest)
        if known is not None:
            return known
        network = network_of(host)
        client = self._clients.of(network)
        wait_s = client.budget.wait_s(now_s)
        if wait_s:
            return Answer.words(
                HTTPStatus.TOO_MANY_REQUESTS,
                "Too many wrong passwords.",
                ("Retry-After", str(math.ceil(wait_s))),
            )
        # Now, and given back if it was right: many may be asked about at once.
        client.budget.take(now_s)

        def settle(is_right: bool) -> str | Answer:
            if not is_right or name not in self._passwords:
                client.wrong_s = now_s
                return Answer.words(HTTPStatus.UNAUTHORIZED, "Wrong name or password.", _CHALLENGE)
            client.budget.give_back()
            self._known[digest] = name.decode()
            return name.decode()

        stored = self._passwords.get(name, self._decoy)
        if is_hash(stored) or not self._at_once.take(now_s):
            is_suspect = now_s - client.wrong_s < SUSPECT_S
            drop = client.budget.give_back
            return Doubt(stored, password, host, network, is_suspect, settle, drop)
        answer = settle(self.is_right(stored, password))
        if not isinstance(answer, Answer):
            self._at_once.give_back()
        return answer

    def is_right(self, stored: bytes, password: bytes) -> bool:
        """Whether this is the password, or that of the hash; with a hash it takes long."""
        if is_hash(stored):
            return verify(stored, password)
        # As digests, which all have one length: else the time would show how long the password is.
        both = [hmac.digest(self._secret, one, "sha256") for one in (stored, password)]
        return hmac.compare_digest(*both)


def _credentials(header: str) -> tuple[bytes, bytes] | None:
    """Name and password of an `Authorization: Basic`; None if it is none."""
    scheme, _, text = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, password = base64.b64decode(text.strip(), validate=True).partition(b":")
    except (binascii.Error, ValueError):
        return None
    return (name, password) if colon else None
