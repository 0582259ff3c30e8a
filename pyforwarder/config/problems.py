"""Makes of a validator's complaint a `ConfigError` that names the line and the key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pydantic_core import PydanticCustomError

from pyforwarder.config.values import describe, suggestion
from pyforwarder.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

    from pyforwarder.config.document import Node

_PROBLEM: Final = "problem"
_MOST_SHOWN: Final = 10  # errors after that are mostly consequences of the first ones


def problem(reason: str, *at: str | int) -> PydanticCustomError:
    """An error for a validator to raise, about something inside the value it was given.

    `at` leads from that value to the part that is wrong: `problem("...", 1, "name")`.
    """
    return PydanticCustomError(_PROBLEM, "{reason}", {"reason": reason, "at": at})


def config_error(error: ValidationError, document: Node, *, source: str) -> ConfigError:
    """All complaints as one error in the order of their lines; it carries the first one's place."""
    complaints = []
    for details in error.errors(include_url=False):
        file, path, line = document.place(_path(details))
        complaints.append((file or source, line, path, _reason(details)))
    complaints.sort(key=lambda complaint: (complaint[0] != source, complaint[:2]))
    (source, line, path, reason), *others = complaints
    shown = [
        str(ConfigError(other_reason, path=other_path, line=other_line, source=other_source))
        for other_source, other_line, other_path, other_reason in others[: _MOST_SHOWN - 1]
    ]
    if len(others) >= _MOST_SHOWN:
        shown.append(f"and {len(others) - _MOST_SHOWN + 1} more")
    return ConfigError("\n".join([reason, *shown]), path=path, line=line, source=source)


def _path(details: ErrorDetails) -> list[str | int]:
    path = [part for part in details["loc"] if part != "[key]"]
    if details["type"] == _PROBLEM:
        path += details["ctx"]["at"]
    return path


def _reason(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    value = details["input"]
    match details["type"]:
        case "problem":
            return str(context["reason"])
        case "value_error":
            return str(context["error"])
        case "missing":
            return f"the key {details['loc'][-1]!r} is missing"
        case "literal_error":
            words = [
                word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")
            ]
            hint = suggestion(value, words) if isinstance(value, str) else ""
            hint = hint if hint.startswith("did") else f"must be {' or '.join(words)}"
            return f"{describe(value)} is not possible here, {hint}"
        case "dict_type":
            return f"must be keys and values, not {describe(value)}"
        case "list_type" | "tuple_type":
            return f"must be a list, not {describe(value)}"
        case _:
            return f"{details['msg'].replace('Input should be', 'must be')}, not {describe(value)}"
