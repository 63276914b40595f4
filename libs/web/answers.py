"""Answers as JSON, in their family's shape."""

import hashlib
from datetime import datetime
from typing import Any

import orjson
from aiohttp import web
from pydantic import BaseModel

from libs.core.clock import isoformat_z


def dump(value: Any) -> bytes:
    """JSON as the API writes it: compact, timestamps in UTC with ``Z``, ``orjson.Fragment`` untouched."""
    return orjson.dumps(value, default=_jsonable, option=orjson.OPT_PASSTHROUGH_DATETIME)


def _jsonable(value: Any) -> Any:
    match value:
        case datetime():
            return isoformat_z(value)
        case BaseModel():
            return dict(value)
        case set() | frozenset():
            return sorted(value)
        case _:
            raise TypeError(f"{type(value).__name__} is not JSON")


def success(
    data: Any, *, message: str = "", status: int = 200, etag: int | str | None = None, embeds_others: bool = False
) -> web.Response:
    """The project family's envelope.

    Args:
        etag: the entity's version; with ``embeds_others`` the tag also holds a hash of the body.
    """
    return json_answer({"success": True, "message": message, "data": data}, status, etag, embeds_others=embeds_others)


def json_answer(
    data: Any, status: int = 200, etag: int | str | None = None, *, embeds_others: bool = False
) -> web.Response:
    """A JSON body as it is, for the families without an envelope."""
    body = dump(data)
    response = web.Response(status=status, body=body, content_type="application/json")
    if etag is not None:
        digest = f".{hashlib.sha256(body).hexdigest()[:16]}" if embeds_others else ""
        response.headers["ETag"] = f'"{etag}{digest}"'
        response.headers["Cache-Control"] = "private, no-cache"
    return response
