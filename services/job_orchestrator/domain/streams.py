"""What a job's request says about streams, checked and kept as the JSON text that was sent."""

from collections.abc import Iterable
from typing import Any

from libs.connectors import registry
from libs.contracts.streams import (
    PATH_LENGTH_MAX,
    Refusal,
    StreamsConfig,
    parse_advanced_settings,
    parse_streams_config,
    unknown_fields,
    unknown_fields_of_choice,
    unknown_sync_modes,
    unsupported,
)
from libs.core.errors import FieldError, InvalidInput, TooLarge
from libs.core.json import check_json, dump_json, parse_json
from libs.core.validation import FINDINGS_MAX

SIZE_BYTES_MAX = 800 * 1024


def supported_catalog_text(value: Any, field: str = "streams_config") -> str:
    """The JSON text of a job's catalog. Raises ``InvalidInput`` naming everything that is unknown or unsupported."""
    text, config = catalog_of(value, field)
    _refuse(unknown_fields_of_choice(config), field, "unknown_field")
    _refuse(unsupported(config), field, "not_supported")
    return text


def refuse_beyond(text: str, source_type: str, destination_type: str, field: str = "streams_config") -> None:
    """Raise ``InvalidInput`` naming everything that a catalog asks of a source or destination that can't do it."""
    can = registry.capabilities(source_type, destination_type)
    _refuse(unsupported(parse_streams_config(text, field), can), field, "not_supported")


def catalog_of(value: Any, field: str) -> tuple[str, StreamsConfig]:
    """A catalog as JSON text and parsed; unknown fields and unsupported settings pass.

    Raises:
        InvalidInput: it has another shape, or a sync mode that does not exist.
    """
    text = object_text(value, field)
    config = parse_streams_config(text, field)
    _refuse(unknown_sync_modes(config), field, "invalid")
    return text, config


def advanced_settings_text(value: Any, field: str = "advanced_settings") -> str:
    """The JSON text of a job's further settings, ``null`` for none. Raises ``InvalidInput`` with the paths."""
    if value is None or value == "":
        return "null"
    text = object_text(value, field)
    _refuse(unknown_fields(parse_advanced_settings(text, field)), field, "unknown_field")
    return text


def takes_over(advanced_settings_json: str) -> bool:
    """Whether a job may take over the tables of deleted jobs."""
    settings = parse_json(advanced_settings_json.encode())
    return isinstance(settings, dict) and settings.get("take_over") is True


def object_text(value: Any, field: str) -> str:
    """The JSON text of an object that was sent as an object, or as a string, which is kept as it is.

    Raises:
        InvalidInput: it is neither, or not JSON that the platform stores.
        TooLarge: it is over 800 KiB.
    """
    if isinstance(value, str):
        parsed, text = parse_json(value.encode(), subject=field), value
    else:
        parsed, text = value, dump_json(value)
        check_json(parsed, field)
    if not isinstance(parsed, dict):
        message = "must be a JSON object or a string that holds one"
        raise InvalidInput(f"{field} {message}", errors=[FieldError(field, message)])
    if len(text.encode()) > SIZE_BYTES_MAX:
        message = f"{field} is over {SIZE_BYTES_MAX} bytes"
        raise TooLarge(message, errors=[FieldError(field, message, "too_large")])
    return text


def _refuse(found: Iterable[Refusal], field: str, code: str) -> None:
    errors = [
        FieldError(f"{field}.{item.field}"[:PATH_LENGTH_MAX], item.message, code) for item in list(found)[:FINDINGS_MAX]
    ]
    if errors:
        raise InvalidInput("; ".join(f"{item.field}: {item.message}" for item in errors), errors=errors)
