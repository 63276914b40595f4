"""How much memory values take, by their texts."""

import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

# Most of what documents hold; asking an abstract class about each would cost more than reading them.
_SMALL = frozenset({type(None), bool, int, float, datetime})


def text_bytes(value: Any) -> int:
    """The bytes that the texts in a value take in memory, at any depth; what else it holds is small."""
    kind = type(value)
    if kind is str or kind is bytes:
        return sys.getsizeof(value)
    if kind in _SMALL:
        return 0
    if kind is dict or isinstance(value, Mapping):
        return sum(map(text_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(text_bytes, value))
    return sum(text_bytes(getattr(value, name)) for name in _names(value.__class__))


@lru_cache(maxsize=1024)
def _names(kind: type[Any]) -> tuple[str, ...]:
    if issubclass(kind, BaseModel):
        return tuple(kind.model_fields)
    return tuple(item.name for item in fields(kind)) if is_dataclass(kind) else ()
