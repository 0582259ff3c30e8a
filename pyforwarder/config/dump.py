"""A configuration as YAML, every default written out, for `check --dump`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import yaml
from pydantic import ValidationError

from pyforwarder.config import values
from pyforwarder.config.model import Handover
from pyforwarder.config.section import Section

if TYPE_CHECKING:
    from pyforwarder.config.document import Plain
    from pyforwarder.config.model import Config


def dump_config(config: Config) -> str:
    """YAML that `check` accepts and that means the same: every key with the value in force.

    Left out are keys whose default is \"nothing\", and those that would be an error where they
    mean nothing, such as `token` in a rule that reads no instruction.
    """
    return yaml.dump(
        _plain_section(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


class _Dumper(yaml.SafeDumper):
    """Writes each value where it stands, without anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _plain_section(section: Section) -> dict[str, Plain]:
    written = section.model_dump(by_alias=True)
    plain: dict[str, Plain] = {}
    optional = set()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        key = field.alias or name
        if isinstance(section, Handover) and name == "spliced_bytes":
            # Its default depends on whether `after_bytes` is given, as it is here.
            plain[key] = values.format_size(section.splice_after_bytes)
        elif value is not None:
            plain[key] = _plain(value, written[key])
            if name not in section.model_fields_set:
                optional.add(key)
    return _without_errors(type(section), plain, optional)


def _plain(value: object, written: object) -> Plain:
    """Return a value as it is written: sections key by key, everything else as its type writes
    it.
    """
    if isinstance(value, Section):
        return _plain_section(value)
    if isinstance(value, tuple | list) and isinstance(written, tuple | list):
        return [_plain(item, text) for item, text in zip(value, written, strict=True)]
    if isinstance(value, Mapping) and isinstance(written, Mapping):
        return {str(key): _plain(item, written[key]) for key, item in value.items()}
    return cast("Plain", written)


def _without_errors(
    kind: type[Section], plain: dict[str, Plain], optional: set[str]
) -> dict[str, Plain]:
    """Return `plain` without those of the `optional` keys that are an error when they are
    written.
    """
    while True:
        try:
            kind.model_validate(plain)
        except ValidationError as error:
            wrong = {_key(details.get("ctx", {}), details["loc"]) for details in error.errors()}
            if not wrong & optional:
                return plain  # not for what was written out: `check` says what it is
            plain = {key: value for key, value in plain.items() if key not in wrong & optional}
            optional = optional - wrong
        else:
            return plain


def _key(context: Mapping[str, object], place: tuple[str | int, ...]) -> object:
    at = context.get("at", ())
    assert isinstance(at, tuple)
    return next(iter((*place, *at)), None)
