"""A job's catalog of streams (``streams_config``): its shape, and which chosen streams a change makes start afresh."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from libs.contracts.streams import (
    AdvancedSettings,
    Refusal,
    StreamKey,
    StreamsConfig,
    refusals,
    unknown_fields,
    unknown_fields_of_choice,
)
from libs.core.errors import FieldError, InvalidInput, TooLarge
from libs.core.json import JsonObject, check_json, dump_json, parse_json
from libs.core.validation import FINDINGS_MAX, field_errors

SIZE_BYTES_MAX = 800 * 1024
FIELD_LENGTH_MAX = 200
SYNC_MODES = ("full_refresh", "incremental", "cdc", "strict_cdc")

_STREAM_SETTINGS = ("sync_mode", "cursor_field", "destination_database", "destination_table")
_SELECTION_SETTINGS = ("normalization", "partition_regex", "append_mode", "filter", "filter_config")

ModelT = TypeVar("ModelT", bound=BaseModel)


def object_text(value: Any, field: str) -> str:
    """The JSON text of an object that came as one or as a string holding one; a string is kept as it came.

    Raises:
        InvalidInput: neither, or JSON that the platform does not carry; ``TooLarge``: over 800 KiB.
    """
    if isinstance(value, str):
        parsed, text = parse_json(value.encode(), subject=field), value
    else:
        parsed, text = value, dump_json(value)
        check_json(parsed, field)
    if not isinstance(parsed, dict):
        raise _invalid(field, "must be a JSON object or a string holding one")
    if len(text.encode()) > SIZE_BYTES_MAX:
        message = f"{field} is over {SIZE_BYTES_MAX} bytes"
        raise TooLarge(message, errors=[FieldError(field, message, "too_large")])
    return text


def catalog_text(value: Any, field: str = "streams_config") -> str:
    """The JSON text of a catalog; raises ``InvalidInput`` naming what is wrong with it."""
    text = object_text(value, field)
    check_catalog(parse_json(text.encode(), subject=field), field)
    return text


def honoured_catalog_text(value: Any, field: str = "streams_config") -> str:
    """The JSON text of a catalog; raises ``InvalidInput`` naming everything in it that runs don't support."""
    text = catalog_text(value, field)
    catalog = parse_json(text.encode())
    _refuse_unknown(unknown_fields_of_choice(catalog), field)
    config = _parsed(StreamsConfig, catalog, field)
    _refuse([FieldError(f"{field}.{item.field}", item.message, "not_supported") for item in refusals(config)])
    return text


def advanced_settings_text(value: Any, field: str = "advanced_settings") -> str:
    """The JSON text of a job's further settings, ``null`` for none; raises ``InvalidInput`` naming what is wrong."""
    if value is None or value == "":
        return "null"
    text = object_text(value, field)
    settings = parse_json(text.encode())
    _refuse_unknown(unknown_fields(AdvancedSettings, settings), field)
    _parsed(AdvancedSettings, settings, field)
    return text


def takes_over(advanced_settings_json: str) -> bool:
    """Whether a job may take over the tables of deleted jobs."""
    settings = parse_json(advanced_settings_json.encode())
    return isinstance(settings, dict) and settings.get("take_over") is True


def check_catalog(catalog: JsonObject, field: str) -> None:
    """Hold a catalog to its shape; unknown fields are tolerated."""
    selected, streams = catalog.get("selected_streams", {}), catalog.get("streams", [])
    if not isinstance(selected, dict):
        raise _invalid(f"{field}.selected_streams", "must be an object of namespaces")
    for namespace, chosen in selected.items():
        path = f"{field}.selected_streams.{namespace}"
        if not isinstance(chosen, list):
            raise _invalid(path, "must be a list of streams")
        for index, item in enumerate(chosen):
            if not isinstance(item, dict) or not isinstance(item.get("stream_name"), str):
                raise _invalid(f"{path}[{index}]", "must be an object with a stream_name")
    if not isinstance(streams, list):
        raise _invalid(f"{field}.streams", "must be a list")
    for index, entry in enumerate(streams):
        _check_stream(entry, f"{field}.streams[{index}]")


def _check_stream(entry: Any, path: str) -> None:
    stream = entry.get("stream") if isinstance(entry, dict) else None
    if not isinstance(stream, dict) or not isinstance(stream.get("name"), str):
        raise _invalid(path, "must be an object with a stream that has a name")
    if not isinstance(stream.get("namespace"), str | None):
        raise _invalid(f"{path}.stream.namespace", "must be a string")
    mode = stream.get("sync_mode")
    if mode not in (None, "") and mode not in SYNC_MODES:
        raise _invalid(f"{path}.stream.sync_mode", f"must be one of {', '.join(SYNC_MODES)}")


def selects_streams(catalog: JsonObject) -> bool:
    """Whether any stream is chosen."""
    return any(catalog.get("selected_streams", {}).values())


def difference(before: JsonObject, after: JsonObject) -> JsonObject:
    """The catalog of streams chosen in both whose data can't go on as it is, defined as before; empty for none.

    A stream that is newly chosen has nothing to clear, one that is no longer chosen keeps what it has.
    """
    chosen_before, chosen_after = _selection(before), _selection(after)
    defined_before, defined_after = _definitions(before), _definitions(after)
    changed = [
        key
        for key in chosen_before.keys() & chosen_after.keys()
        if _settings(chosen_before[key], _SELECTION_SETTINGS) != _settings(chosen_after[key], _SELECTION_SETTINGS)
        or _settings(defined_before.get(key, {}), _STREAM_SETTINGS)
        != _settings(defined_after.get(key, {}), _STREAM_SETTINGS)
    ]
    if not changed:
        return {}
    selected: dict[str, list[JsonObject]] = {}
    for key in sorted(changed):
        selected.setdefault(key[0], []).append(chosen_before[key])
    streams = [{"stream": defined_before[key]} for key in sorted(changed) if key in defined_before]
    return {"selected_streams": selected, "streams": streams}


def _selection(catalog: JsonObject) -> dict[StreamKey, JsonObject]:
    return {
        (namespace, item["stream_name"]): item
        for namespace, chosen in catalog.get("selected_streams", {}).items()
        for item in chosen
    }


def _definitions(catalog: JsonObject) -> dict[StreamKey, JsonObject]:
    entries = [entry["stream"] for entry in catalog.get("streams", [])]
    return {(stream.get("namespace") or "", stream["name"]): stream for stream in entries}


def _settings(source: JsonObject, names: tuple[str, ...]) -> list[Any]:
    return [source.get(name) or None for name in names]


def _parsed(model: type[ModelT], value: Any, field: str) -> ModelT:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        _refuse(field_errors(error, field))
        raise


def _refuse_unknown(found: Iterable[Refusal], field: str) -> None:
    _refuse([FieldError(f"{field}.{item.field}", item.message, "unknown_field") for item in found])


def _refuse(errors: Sequence[FieldError]) -> None:
    if errors:
        kept = [replace(item, field=item.field[:FIELD_LENGTH_MAX]) for item in errors[:FINDINGS_MAX]]
        raise InvalidInput("; ".join(f"{item.field}: {item.message}" for item in kept), errors=kept)


def _invalid(field: str, message: str) -> InvalidInput:
    named = field[:FIELD_LENGTH_MAX]
    return InvalidInput(f"{named} {message}", errors=[FieldError(named, message)])
