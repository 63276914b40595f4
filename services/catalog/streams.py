"""The catalog that a discovery answers: the source's streams, with a job's choice if it has one.

A saved catalog is read item by item here, since the choice has to survive whatever an earlier version stored beside it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from libs.contracts.streams import STREAM_SETTINGS
from libs.core.json import JsonObject


def new_catalog(entries: Sequence[JsonObject]) -> JsonObject:
    """The catalog for a new job: every stream is selected, as OLake's own discovery does."""
    selected: JsonObject = {}
    for entry in entries:
        stream = entry["stream"]
        selected.setdefault(stream.get("namespace") or "", []).append(_selection(stream))
    return {"selected_streams": selected, "streams": list(entries)}


def merged_catalog(entries: Sequence[JsonObject], saved: Any) -> JsonObject:
    """The catalog for an existing job: its choice applies to streams that still exist; new ones are not selected."""
    saved = saved if isinstance(saved, dict) else {}
    chosen = {_name(entry["stream"]): entry["stream"] for entry in _entries(saved)}
    streams = [{**entry, "stream": _with_choice(entry["stream"], chosen)} for entry in entries]
    present = {_name(entry["stream"]) for entry in entries}
    selected = {}
    for namespace, selections in _dict(saved.get("selected_streams")).items():
        kept = [item for item in _dicts(selections) if (namespace, item.get("stream_name")) in present]
        if kept:
            selected[namespace] = kept
    return {"selected_streams": selected, "streams": streams}


def _selection(stream: Mapping[str, Any]) -> JsonObject:
    defaults = _dict(stream.get("default_stream_properties"))
    return {
        "stream_name": stream["name"],
        "partition_regex": "",
        "normalization": bool(defaults.get("normalization", False)),
        "append_mode": bool(defaults.get("append_mode", False)),
        "filter": "",
    }


def _with_choice(stream: JsonObject, chosen: Mapping[tuple[str, str], JsonObject]) -> JsonObject:
    before = chosen.get(_name(stream))
    if before is None:
        return stream
    choice = {name: before[name] for name in STREAM_SETTINGS if name in before}
    if choice.get("sync_mode") not in stream.get("supported_sync_modes", ()):
        choice.pop("sync_mode", None)
        choice.pop("cursor_field", None)
    return {**stream, **choice}


def _name(stream: Mapping[str, Any]) -> tuple[str, str]:
    return str(stream.get("namespace") or ""), str(stream.get("name"))


def _entries(catalog: Mapping[str, Any]) -> list[JsonObject]:
    return [entry for entry in _dicts(catalog.get("streams")) if isinstance(entry.get("stream"), dict)]


def _dict(value: Any) -> JsonObject:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[JsonObject]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
