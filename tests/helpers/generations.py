"""Generations of a configuration, as a worker compiles them."""

from __future__ import annotations

from pyforwarder.config import parse_config
from pyforwarder.runtime.counters import Directory
from pyforwarder.worker.generation import Generation, counter_indexes
from pyforwarder.worker.settings import Settings, with_overrides


def settings_of(
    text: str,
    *,
    overrides: dict[str, str] | None = None,
    binds: dict[str, tuple[str, ...]] | None = None,
    directory: Directory | None = None,
) -> Settings:
    config = with_overrides(parse_config(text, source="test.yaml"), overrides or {})
    return Settings(
        config_text=text,
        source="test.yaml",
        overrides=overrides or {},
        keys={},
        binds=binds or {listener.name: (str(listener.bind[0]),) for listener in config.listeners},
        indexes=counter_indexes(config, directory or Directory()),
    )


def generation_of(text: str, *, previous: Generation | None = None) -> Generation:
    return Generation(settings_of(text), worker=0, previous=previous)
