"""Names, configurations and ids as requests give them."""

import unicodedata
from typing import Any

from libs.core.errors import FieldError, InvalidInput
from libs.core.json import INTEGER_MAX, JsonObject, parse_json

NAME_LENGTH_MAX = 255


def canonical_name(name: str) -> str:
    """Trimmed, and composed (Unicode NFC), so that equal-looking names are equal.

    Raises:
        InvalidInput: empty, over 255 characters, or with control characters.
    """
    cleaned = unicodedata.normalize("NFC", name).strip()
    if not 1 <= len(cleaned) <= NAME_LENGTH_MAX:
        raise invalid("name", f"must be 1 to {NAME_LENGTH_MAX} characters")
    if not cleaned.isprintable():
        raise invalid("name", "must not contain control characters")
    return cleaned


def config_object(config: Any) -> JsonObject:
    """A configuration that came as an object, or as a text that holds one."""
    if isinstance(config, str):
        config = parse_json(config.encode(), subject="config")
    if not isinstance(config, dict):
        raise invalid("config", "must be a JSON object, or a string that holds one")
    return config


def entity_id_of(text: str) -> int | None:
    """The id in a path; None for a number that no entity can have."""
    if not (text.isascii() and text.isdigit()):
        raise invalid("id", "must be a whole number")
    number = int(text[:20])
    return number if number <= INTEGER_MAX else None


def invalid(field: str, message: str, code: str = "invalid") -> InvalidInput:
    """A field at fault."""
    return InvalidInput(f"{field}: {message}", errors=[FieldError(field, message, code)])
