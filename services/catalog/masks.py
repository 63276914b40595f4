"""Masks: what a configuration shows in place of its secrets.

A mask is a reference: it names the connection, the field and the stored secret's version. Whoever sends it back means
the stored secret, without ever having seen it.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from libs.connectors.form import Path
from libs.core.json import JsonObject
from services.catalog.domain.connection import Role

STARS = "********"

_MASK = re.compile(r"\*{8}:(source|destination)/(\d{1,18})/([^/]{1,200})/([A-Za-z0-9_-]{22})")


@dataclass(frozen=True, slots=True)
class Mask:
    """``field`` is the secret's path in the configuration; ``secret_ref`` is random, so that it can't be guessed."""

    role: Role
    entity_id: int
    field: str
    secret_ref: str

    def __str__(self) -> str:
        return f"{STARS}:{self.role}/{self.entity_id}/{self.field}/{self.secret_ref}"


def is_masked(value: str) -> bool:
    """Whether the text is a mask; no secret may begin with as many asterisks."""
    return value.startswith(STARS)


def parse_mask(value: str) -> Mask | None:
    """The mask in a text, None if it is none of ours."""
    matched = _MASK.fullmatch(value)
    if matched is None:
        return None
    role: Role = "source" if matched[1] == "source" else "destination"
    return Mask(role, int(matched[2]), matched[3], matched[4])


def secrets_in(config: Mapping[str, Any], fields: Iterable[Path]) -> dict[Path, str]:
    """The non-empty secrets of a configuration, by path."""
    found = {}
    for path in fields:
        value: Any = config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, str) and value:
            found[path] = value
    return found


def with_secrets(config: Mapping[str, Any], secrets: Mapping[Path, str]) -> JsonObject:
    """A copy of the configuration with other texts at these paths."""
    changed: JsonObject = copy.deepcopy(dict(config))
    for path, value in secrets.items():
        place = changed
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value
    return changed


def starred(config: Mapping[str, Any], fields: Iterable[Path]) -> JsonObject:
    """A copy that shows no secret, for configurations that are not stored; masks stay what they are."""
    typed = {path: value for path, value in secrets_in(config, fields).items() if not is_masked(value)}
    return with_secrets(config, dict.fromkeys(typed, STARS))
