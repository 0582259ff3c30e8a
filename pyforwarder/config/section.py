"""What every section of the configuration is: a mapping whose keys are all known."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator

from pyforwarder.config import values
from pyforwarder.config.problems import problem


class Section(BaseModel):
    """A mapping whose keys are all known; a key without a value is as good as absent."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _only_known_keys(cls, data: object) -> object:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        if not isinstance(data, dict):
            raise problem(
                f"must be keys and values ({', '.join(known)}), not {values.describe(data)}"
            )
        for key in data:
            if key not in known:
                hint = cls._place_of(key, data) or values.suggestion(key, known)
                raise problem(f"unknown key {key!r}, {hint}", key)
        return {key: value for key, value in data.items() if value is not None}

    @classmethod
    def _place_of(cls, key: object, data: dict[object, object]) -> str:
        """What to write where an unknown key belongs somewhere else; "" if that is not known."""
        return ""
