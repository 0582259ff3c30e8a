"""Why a store has not answered, in a few words: of all that libraries put around it, the cause."""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
from collections.abc import Iterator
from typing import Final

import requests

from pyforwarder.fleet.quick_requests import AnswerFault

_NO_TIME: Final = "no answer in time"
_NO_ANSWER: Final = "no answer of etcd"
# Libraries put errors into errors; nobody puts more than these around one.
_MOST: Final = 32


def cause_of(error: BaseException) -> str:
    """What has happened on the way to the store, or to its answer."""
    errors = list(_inside(error))
    for words_of in (_time, _tls, _network, _answer):
        for one in reversed(errors):  # what others were made of comes first
            if words := words_of(one):
                return words
    return str(error) or type(error).__name__


def _time(error: BaseException) -> str:
    """A wait of ours has ended; the kernel's own (ETIMEDOUT) has a number."""
    is_ours = isinstance(error, TimeoutError) and error.errno is None
    return _NO_TIME if is_ours or isinstance(error, requests.exceptions.Timeout) else ""


def _tls(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not good: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {(error.reason or str(error)).replace('_', ' ').lower()}"
    return ""


def _network(error: BaseException) -> str:
    if isinstance(error, http.client.RemoteDisconnected):  # made by a library, without a number
        return "the connection was closed without an answer"
    if isinstance(error, socket.gaierror):
        return (error.strerror or "the name is not known").lower()
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return ""


def _answer(error: BaseException) -> str:
    if isinstance(error, AnswerFault):
        return str(error)
    if isinstance(error, requests.exceptions.ChunkedEncodingError | http.client.IncompleteRead):
        return "an answer that is cut off"
    of_answers = (http.client.HTTPException, json.JSONDecodeError, requests.JSONDecodeError)
    return _NO_ANSWER if isinstance(error, (*of_answers, KeyError)) else ""


def _inside(error: BaseException) -> Iterator[BaseException]:
    """The error and those in it, each once; an inner one after those around it."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < _MOST:
        one = waiting.pop(0)
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        parts = (one.__cause__, one.__context__, getattr(one, "reason", None), *one.args)
        waiting += [part for part in parts if isinstance(part, BaseException)]
