"""The store of a fleet: etcd, by its HTTP gateway (API v3, etcd 3.4 and later).

etcd3gw does the requests, their errors and leases. Its watch is not used: it reads a stream in a
thread of its own whose errors nobody gets, and takes pieces of a stream for whole messages.

All methods wait at most `timeout_s` for each member, for its answer to our name and password, too,
and raise `StoreError`.

Source: https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/, api/etcdserverpb/rpc.proto.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import (
    ConnectionFailedError,
    ConnectionTimeoutError,
    Etcd3Exception,
)
from requests.adapters import HTTPAdapter

from pyforwarder.errors import ForwarderError
from pyforwarder.fleet.causes import cause_of
from pyforwarder.fleet.quick_requests import Line, TooLongError

if TYPE_CHECKING:
    import ssl

    from pyforwarder.config import Fleet
    from pyforwarder.fleet.files import StoreFiles

T = TypeVar("T")

REQUEST_TIMEOUT_S: Final = 3.0
# A watch that says nothing for so long is asked for again: the connection may have died silently.
WATCH_TIMEOUT_S: Final = 5.0
MOST_IN_ONE: Final = 128  # changes in one request: etcd's --max-txn-ops
# A transaction may consist of others, which count with it: two of them have so many less.
_MOST_IN_HALF: Final = MOST_IN_ONE - 2
MOST_IN_WRITE: Final = 2 * _MOST_IN_HALF  # in one `Store.write`
_MOST_LINE_BYTES: Final = 16 << 20
# One answer, and all answers of one list: who may write in the store may write more than we
# have room for. One value has 1.5 MB at most (etcd's --max-request-bytes).
MOST_ANSWER_BYTES: Final = 8 << 20
MOST_LIST_BYTES: Final = 128 << 20
# A list is asked for in pages of so many keys: more in the next one, where these were short.
_FIRST_KEYS: Final = 256
_MOST_KEYS: Final = 8192
_PIECE_BYTES: Final = 64 << 10
# A member that is cut off from the others ends a watch, instead of telling of nothing for ever.
# Source: https://etcd.io/docs/v3.4/learning/api/#watch-streams, rpctypes.MetadataRequireLeaderKey.
_HAS_LEADER: Final = {"Grpc-Metadata-hasleader": "true"}
_NOT_FOUND: Final = 5  # google.rpc.Code
_OK: Final = 200
# What is read of the answer to a transaction; it begins with its header.
_TXN_REVISION: Final = re.compile(rb'\{"header":\{[^{}]*"revision":"([0-9]+)"[^{}]*\}')
_PUT: Final = b'"response_put"'
_DELETED: Final = b'"deleted":"'  # nothing of that if nothing was
_CHANGED: Final = b'"mod_revision":"'


class StoreError(ForwarderError):
    """The store does not answer, or refuses."""


class NoSuchLeaseError(StoreError):
    """The lease of a key is gone."""


class AnswerTooLongError(StoreError):
    """The store has more to say than there is room for."""


class CompactedError(StoreError):
    """The store has dropped the changes that are asked for: what there is now is to be listed."""


class Found(NamedTuple):
    """Keys and values below a prefix, as they were at one revision of the store."""

    revision: int
    entries: list[tuple[str, bytes]]


class Standing(NamedTuple):
    """What there is of a key besides its value."""

    revision: int  # of its last change
    lease: int  # 0: none, it stays until somebody removes it


class Change(NamedTuple):
    """What has become of one key."""

    revision: int
    key: str
    value: bytes | None  # None: it is gone


class Echo(NamedTuple):
    """A message of a watch, as it has come: all of it became so at one revision."""

    revision: int
    message: bytes


class MessageFault(ValueError):
    """What a watch has said is no message of etcd."""


class Store:
    """Speaks to one member of the store's cluster at a time, and to the next one when that
    fails.
    """

    def __init__(
        self, fleet: Fleet, files: StoreFiles, *, timeout_s: float = REQUEST_TIMEOUT_S
    ) -> None:
        """Open no connection yet; `timeout_s` is how long each member is waited for."""
        self._credentials = files.credentials
        self.timeout_s: Final = timeout_s
        self._clients = [
            _client(endpoint, files.context, timeout_s) for endpoint in fleet.endpoints
        ]
        self._lines = [_line(endpoint, files.context) for endpoint in fleet.endpoints]
        self._current = 0
        self.until_s = math.inf  # (time.monotonic()) no answer is waited for longer; not of watches
        self._is_known = False  # to the member: we have a token, or need none
        self.answered_s = 0.0  # (time.monotonic()) when a member did last; 0: never
        self.written = 0  # the revision of the last `put`, or `write` that has set a key

    @property
    def endpoint(self) -> str:
        """The member that we speak to now."""
        return self._clients[self._current].base_url

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            client.session.close()
        for line in self._lines:
            if line is not None:
                line.close()

    def list(self, prefix: str) -> Found:
        """All keys below a prefix, in order.

        Raises:
            AnswerTooLongError: they and their values have more than `MOST_LIST_BYTES`.
        """
        entries: list[tuple[str, bytes]] = []
        body: dict[str, Any] = {"key": _encode(prefix), "range_end": _end_of(prefix)}
        most_keys, left_bytes = _FIRST_KEYS, MOST_LIST_BYTES
        while True:
            try:
                answer = self._post("/kv/range", {**body, "limit": most_keys})
            except AnswerTooLongError:
                if most_keys == 1:
                    raise
                most_keys = max(1, most_keys // 16)
                continue
            page = answer.get("kvs", ())
            size = 0
            for entry in page:
                key, value = _decode(entry["key"]), _decode(entry.get("value", ""))
                entries.append((key.decode(errors="replace"), value))
                size += len(key) + len(value)
            left_bytes -= size
            if left_bytes < 0:
                raise AnswerTooLongError(f"etcd at {self.endpoint}: more below {prefix} than fits")
            revision = int(body.get("revision", 0)) or _revision(answer)
            if not answer.get("more") or not page:
                return Found(revision, entries)
            # All of it as it was at the first page's moment.
            behind = base64.b64encode(key + b"\0").decode()
            body |= {"key": behind, "revision": revision}
            if size < MOST_ANSWER_BYTES // 8:
                most_keys = min(2 * most_keys, _MOST_KEYS)

    def get(self, key: str) -> tuple[bytes, int] | None:
        """A key's value and the revision of its last change; None if there is no such key."""
        answer = self._post("/kv/range", {"key": _encode(key)})
        for entry in answer.get("kvs", ()):
            return _decode(entry.get("value", "")), int(entry["mod_revision"])
        return None

    def standing(self, key: str) -> Standing | None:
        """Who holds a key, and since when; None if there is no such key. Its value stays there."""
        answer = self._post("/kv/range", {"key": _encode(key), "keys_only": True})
        for entry in answer.get("kvs", ()):
            return Standing(int(entry["mod_revision"]), int(entry.get("lease", 0)))
        return None

    def put(self, key: str, value: str, *, lease: int = 0) -> None:
        """Set a key; with a lease it goes when that ends."""
        body = {"key": _encode(key), "value": _encode(value), "lease": lease}
        self.written = _revision(self._post("/kv/put", body))

    def delete(self, key: str) -> None:
        """Remove a key, if it is there."""
        self._post("/kv/deleterange", {"key": _encode(key)})

    def change(
        self,
        key: str,
        value: str,
        *,
        was: int,
        also: Sequence[tuple[str, str | None]] = (),
        lease: int = 0,
    ) -> bool:
        """Set a key if its last change was at revision `was` (0: if it is not there), else False.

        In the same moment `also` sets other keys, or removes them (None). What is set has `lease`.
        """
        changes = [
            {"request_put": {"key": _encode(name), "value": _encode(text), "lease": lease}}
            if text is not None
            else {"request_delete_range": {"key": _encode(name)}}
            for name, text in [(key, value), *also]
        ]
        compare = {
            "key": _encode(key),
            "result": "EQUAL",
            "target": "MOD",
            "mod_revision": was,
        }
        answer = self._post("/kv/txn", {"compare": [compare], "success": changes})
        return bool(answer.get("succeeded"))

    def create(self, key: str, value: str, *, lease: int = 0) -> bool:
        """Set a key if it is not there, else False."""
        compare = {"key": _encode(key), "result": "EQUAL", "target": "CREATE", "create_revision": 0}
        put = {"request_put": {"key": _encode(key), "value": _encode(value), "lease": lease}}
        answer = self._post("/kv/txn", {"compare": [compare], "success": [put]})
        return bool(answer.get("succeeded"))

    def create_each(self, entries: Sequence[tuple[str, str, int]]) -> Sequence[bool]:
        """Set those of some keys (key, value, lease) that are not there, in one transaction.

        True for each that has its value now: by this, or by a call before whose answer was lost.
        Keys are different ones; etcd takes 128 of them by default.

        Raises:
            NoSuchLeaseError: one of the leases is gone; no key is set.
        """
        changes = [
            {
                "request_txn": {
                    "compare": [
                        {
                            "key": _encode(key),
                            "result": "EQUAL",
                            "target": "CREATE",
                            "create_revision": 0,
                        }
                    ],
                    "success": [
                        {
                            "request_put": {
                                "key": _encode(key),
                                "value": _encode(value),
                                "lease": lease,
                            }
                        }
                    ],
                    "failure": [{"request_range": {"key": _encode(key)}}],
                }
            }
            for key, value, lease in entries
        ]
        answer = self._post("/kv/txn", {"success": changes})
        try:
            found = [one["response_txn"] for one in answer["responses"]]
            return [
                bool(one.get("succeeded"))
                or one["responses"][0]["response_range"]["kvs"][0]["value"] == _encode(value)
                for one, (_, value, _) in zip(found, entries, strict=True)
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise self._failed(f"no answer of etcd: {type(error).__name__}") from error

    def grant(self, ttl_s: int) -> int:
        """A new lease."""
        return int(self._post("/lease/grant", {"TTL": ttl_s, "ID": 0})["ID"])

    def renew(self, lease: int) -> bool:
        """Let a lease begin anew; False if it has ended."""
        answer = self._post("/lease/keepalive", {"ID": lease})
        return int(answer.get("result", {}).get("TTL", 0)) > 0

    def revoke(self, lease: int) -> None:
        """End a lease, and what has it; if the store does not answer, time does that."""
        with contextlib.suppress(StoreError):
            self._post("/kv/lease/revoke", {"ID": lease})

    def write(self, changes: Sequence[tuple[str, str | None]], *, lease: int = 0) -> int:
        """Set keys, with a lease, or remove them (None), all in the same moment.

        At most `MOST_IN_WRITE`, and none of them twice. Returns the revision at which that was
        done; 0: nothing has changed, as no key was there that was to be removed.
        """
        end = b'","lease":"%d"}}' % lease
        requests = [
            b'{"request_put":{"key":"%b","value":"%b%b' % (_bytes(key), _bytes(value), end)
            if value is not None
            else b'{"request_delete_range":{"key":"%b"}}' % _bytes(key)
            for key, value in changes
        ]
        if len(requests) > MOST_IN_ONE:
            halves = requests[:_MOST_IN_HALF], requests[_MOST_IN_HALF:]
            requests = [b'{"request_txn":{"success":[%b]}}' % b",".join(half) for half in halves]
        body = b'{"success":[%b]}' % b",".join(requests)
        answer = self._post_quickly("/kv/txn", body)
        found = _TXN_REVISION.match(answer)
        if found is None:
            raise self._failed("no answer of etcd")
        has_put = _PUT in answer
        revision = int(found[1])
        if has_put:
            self.written = revision
        return revision if has_put or _DELETED in answer else 0

    def distrust(self, reason: str) -> StoreError:
        """The error to raise: the member that we speak to does not tell what it should."""
        return self._failed(reason)

    def compact(self, revision: int) -> None:
        """Drop all values that were overwritten before a revision, of all keys."""
        self._post("/kv/compaction", {"revision": revision})

    def changes(self, prefix: str, *, after: int, until_s: float) -> Iterator[int]:
        """The revision of each change below a prefix after a revision, as they come.

        As `events`.
        """
        for change in self.events(prefix, after=after, until_s=until_s):
            yield change.revision

    def events(self, prefix: str, *, after: int, until_s: float) -> Iterator[Change]:
        """Yield each change below a prefix after a revision, as it comes.

        Raises CompactedError where the store has dropped some of them.

        Ends at `until_s` (time.monotonic()), or when nothing has come for `WATCH_TIMEOUT_S`. What
        came in between two calls is not lost, if the second has the last revision seen.
        """
        for message in self._messages(prefix, after=after, until_s=until_s):
            yield from self._watched(message)

    def events_or_echoes(
        self, prefix: str, *, after: int, until_s: float, is_echo: Callable[[int], bool]
    ) -> Iterator[Change | Echo]:
        """As `events`; but what became so at one revision, of which `is_echo` says that it may be
        ours, is not read (see `changes_in`).
        """
        for message in self._messages(prefix, after=after, until_s=until_s):
            revision = _one_revision(message)
            if revision and is_echo(revision):
                yield Echo(revision, message)
            else:
                yield from self._watched(message)

    def _messages(self, prefix: str, *, after: int, until_s: float) -> Iterator[bytes]:
        """What a watch says, one message after the other."""
        create: dict[str, Any] = {
            "key": _encode(prefix),
            "range_end": _end_of(prefix),
            "start_revision": after + 1,
        }
        client = self._known(time.monotonic() + self.timeout_s)
        left_s = max(0.1, min(WATCH_TIMEOUT_S, until_s - time.monotonic()))
        try:
            with client.session.post(
                client.get_url("/watch"),
                json={"create_request": create},
                headers=_HAS_LEADER,
                stream=True,
                timeout=(self.timeout_s, left_s),
            ) as answer:
                if answer.status_code != requests.codes["ok"]:
                    raise self._failed(f"{answer.status_code} {answer.text[:200]}")
                rest = b""
                for piece in answer.iter_content(chunk_size=None):  # each as it comes
                    *lines, rest = (rest + piece).split(b"\n")
                    if len(rest) > _MOST_LINE_BYTES:
                        raise self._failed("a message that is too long")
                    yield from filter(bytes.strip, lines)
                    if time.monotonic() >= until_s:
                        return
        except requests.exceptions.ConnectionError as error:
            # A read that times out in the middle of a stream is reported as this one.
            if "Read timed out" in str(error):
                return
            raise self._failed(_reason(error)) from error
        except requests.exceptions.Timeout:
            return
        except (requests.exceptions.RequestException, Etcd3Exception) as error:
            raise self._failed(_reason(error)) from error

    def _watched(self, message: bytes) -> Iterator[Change]:
        try:
            yield from changes_in(message)
        except CompactedError as error:
            raise CompactedError(f"etcd at {self.endpoint}: {error}") from None
        except MessageFault as error:
            raise self._failed(str(error)) from error.__cause__

    def _known(self, until_s: float) -> Etcd3Client:
        """The member that we speak to; it knows our name, and is waited for until then."""
        client = self._clients[self._current]
        client.timeout = until_s - time.monotonic()
        if self._credentials is not None and not self._is_known:
            client.session.headers.pop("Authorization", None)
            try:
                answer = client.post(
                    client.get_url("/auth/authenticate"),
                    json={"name": self._credentials.user, "password": self._credentials.password},
                )
                client.session.headers["Authorization"] = answer["token"]
            except (Etcd3Exception, requests.exceptions.RequestException, KeyError) as error:
                raise self._failed(_reason(error)) from error
            self._is_known = True
            client.timeout = until_s - time.monotonic()
            if client.timeout <= 0.0:
                raise self._failed("no answer in time")
        return client

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a request to one member after the other, until one answers; to each once at most."""

        def ask(client: Etcd3Client) -> dict[str, Any]:
            answer = client.post(client.get_url(path), json=body)
            if not isinstance(answer, dict):
                raise self._failed("no answer of etcd")
            return answer

        return self._ask(ask)

    def _post_quickly(self, path: str, body: bytes) -> bytes:
        """As `_post`, for requests that come many times in a second; the answer is not read."""

        def ask(client: Etcd3Client) -> bytes:
            line = self._lines[self._current]
            headers = {"Content-Type": "application/json"}
            if line is None:
                sent = client.session.post(
                    client.get_url(path), data=body, headers=headers, timeout=client.timeout
                )
                status, said = sent.status_code, sent.content
            else:
                status, said = line.post(
                    urlsplit(client.get_url(path)).path,
                    body,
                    authorization=str(client.session.headers.get("Authorization", "")),
                    timeout_s=client.timeout or self.timeout_s,
                    most_bytes=MOST_ANSWER_BYTES,
                )
            if status != _OK:
                raise Etcd3Exception(said.decode(errors="replace"), str(status))
            return said

        return self._ask(ask)

    def _ask(self, ask: Callable[[Etcd3Client], T]) -> T:
        error: StoreError | None = None
        for _ in self._clients:
            now_s = time.monotonic()
            if now_s >= self.until_s:
                raise error or StoreError(f"etcd at {self.endpoint}: no answer in time")
            try:
                client = self._known(min(self.until_s, now_s + self.timeout_s))
                answer = ask(client)
                self.answered_s = time.monotonic()
                return answer
            except StoreError as failed:
                error = failed
            except (_TooLong, TooLongError):
                # Another member would say the same.
                raise AnswerTooLongError(f"etcd at {self.endpoint}: an answer too long") from None
            except Etcd3Exception as failed:
                if _code(failed) == _NOT_FOUND:
                    raise NoSuchLeaseError(f"etcd at {self.endpoint}: {_reason(failed)}") from None
                error = self._failed(_reason(failed))
            except (OSError, ValueError) as failed:  # requests' are OSErrors, too
                error = self._failed(_reason(failed))
        assert error is not None
        raise error

    def _failed(self, reason: str) -> StoreError:
        """The error to raise; the next member is asked from here on."""
        endpoint = self.endpoint
        self._current = (self._current + 1) % len(self._clients)
        self._is_known = False
        return StoreError(f"etcd at {endpoint}: {reason[:300]}")


class _TooLong(requests.exceptions.RequestException):
    """An answer has more than `MOST_ANSWER_BYTES`."""


class _Session(requests.Session):
    """Reads no more of an answer than there may be; streams are the caller's to read."""

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """See `requests.Session.send`.

        Raises:
            _TooLong: it is longer; the connection is closed.
        """
        answer = super().send(request, **{**options, "stream": True})
        if not options.get("stream"):
            read = bytearray()
            for piece in answer.iter_content(_PIECE_BYTES):
                read += piece
                if len(read) > MOST_ANSWER_BYTES:
                    answer.close()
                    raise _TooLong
            answer._content = bytes(read)
        return answer


class _WithContext(HTTPAdapter):
    """Knows the store by this context's authority alone, and shows it this context's certificate.

    Their files were read before: later on we may not be root any more.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._context = context
        super().__init__()

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, **options)

    def build_connection_pool_key_attributes(
        self, *args: Any, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        # Without its authorities' files, which would be added to ours.
        host, _ = super().build_connection_pool_key_attributes(*args, **options)
        return host, {"cert_reqs": "CERT_REQUIRED"}

    def cert_verify(self, conn: Any, *args: Any, **options: Any) -> None:
        del args, options
        conn.cert_reqs = "CERT_REQUIRED"


def _line(endpoint: str, context: ssl.SSLContext | None) -> Line | None:
    """None: requests knows whom the host trusts."""
    if urlsplit(endpoint).scheme == "https" and context is None:
        return None
    return Line(endpoint, context)


def _client(endpoint: str, context: ssl.SSLContext | None, timeout_s: float) -> Etcd3Client:
    parts = urlsplit(endpoint)
    session = _Session()
    session.trust_env = False  # no proxy of the environment, no .netrc
    if context is not None:
        session.mount("https://", _WithContext(context))
    return Etcd3Client(
        host=parts.hostname or "",
        port=parts.port or 2379,
        protocol=parts.scheme,
        timeout=timeout_s,
        api_path="/v3/",
        session=session,
    )


def changes_in(message: bytes) -> Iterator[Change]:
    """What a message of a watch says.

    Raises:
        CompactedError: the watch has ended, as changes are gone that it was to tell of.
        MessageFault: it has ended for another reason, or this is no message.
    """
    try:
        said = json.loads(message)
        if "error" in said:
            raise MessageFault(str(said["error"])[:200])
        result = said["result"]
        if result.get("canceled"):
            if int(result.get("compact_revision", 0)):
                raise CompactedError("changes are compacted")
            raise MessageFault(f"the watch was ended: {result.get('cancel_reason', '?')}")
        for event in result.get("events", ()):
            entry = event["kv"]
            value = None if event.get("type") == "DELETE" else _decode(entry.get("value", ""))
            key = _decode(entry["key"]).decode(errors="replace")
            yield Change(int(entry["mod_revision"]), key, value)
    except MessageFault:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MessageFault(f"no answer of etcd: {type(error).__name__}") from error


def _one_revision(message: bytes) -> int:
    """At which revision all became so that a message of a watch says; 0: at several, or it says
    nothing of the kind. Texts in it are in base64, so they have no quotation marks.
    """
    first = message.find(_CHANGED) + len(_CHANGED)
    last = message.rfind(_CHANGED) + len(_CHANGED)
    end = message.find(b'"', first)
    revision = message[first : end + 1]
    if first < len(_CHANGED) or not revision[:-1].isdigit():
        return 0
    return int(revision[:-1]) if message.startswith(revision, last) else 0


def _reason(error: Exception) -> str:
    """In words: what etcd has answered, or why it has not."""
    if isinstance(error, ConnectionFailedError | ConnectionTimeoutError):
        return cause_of(error)  # its text is that of a library's error
    if isinstance(error, Etcd3Exception) and error.detail_text:
        with contextlib.suppress(ValueError, AttributeError):
            return str(json.loads(error.detail_text).get("error") or error.detail_text)
        return error.detail_text
    return cause_of(error)


def _code(error: Etcd3Exception) -> int:
    """What etcd calls the error; 0: nothing."""
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        return int(json.loads(error.detail_text or "{}").get("code", 0))
    return 0


def _encode(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _bytes(text: str) -> bytes:
    """`_encode`, of which a request is made without further reading."""
    return binascii.b2a_base64(text.encode(), newline=False)


def _decode(text: str) -> bytes:
    return base64.b64decode(text)


def _end_of(prefix: str) -> str:
    """The first key behind all that begin so; prefixes end with a slash."""
    end = prefix.encode()
    return base64.b64encode(end[:-1] + bytes([end[-1] + 1])).decode()


def _revision(answer: dict[str, Any]) -> int:
    return int(answer.get("header", {}).get("revision", 0))
