"""What handlers return, and how it becomes JSON.

A handler returns its value, or an ``Answer`` that also says the entity's version or a message for people. Values are
``TypedDict``s: the type checker holds what a view returns against what the API's description promises.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Generic, TypeVar

import orjson
from aiohttp import web
from pydantic import BaseModel, Field, WithJsonSchema
from typing_extensions import TypedDict

from libs.core.clock import isoformat_z
from libs.core.envelope import Envelope
from libs.core.errors import FieldError

Value_co = TypeVar("Value_co", covariant=True)

Moment = Annotated[datetime, Field(description="ISO 8601 in UTC.", examples=["2026-01-01T12:00:00.000Z"])]
RawObject = Annotated[Any, WithJsonSchema({"type": "object"})]
"""A JSON object that is spliced into the answer as its text is kept: an ``orjson.Fragment``."""


@dataclass(frozen=True, slots=True)
class Answer(Generic[Value_co]):
    """A value with what else its answer says.

    Args:
        version: the entity's version, which becomes the ``ETag``.
        message: for people; in the project family's envelope.
        embeds_others: the value also shows what changes without a new version, so the tag holds a hash of the body.
        headers: further headers.
    """

    value: Value_co
    version: int | None = None
    message: str = ""
    embeds_others: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


class EventShown(TypedDict):
    """What happened to an entity: which event, when, by whom."""

    id: Annotated[str, Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])]
    version: Annotated[int, Field(ge=1)]
    type: Annotated[str, Field(examples=["renamed"])]
    time: Moment
    actor: Annotated[str, Field(examples=["ann"])]
    data: RawObject


def event_view(envelope: Envelope) -> EventShown:
    """An event as histories show it, its data as they are kept."""
    return {
        "id": envelope.id,
        "version": envelope.version,
        "type": envelope.type,
        "time": envelope.time,
        "actor": envelope.metadata.actor,
        "data": orjson.Fragment(envelope.data_json),
    }


class FieldErrorShown(TypedDict):
    """One field at fault: a dotted path such as ``source.config.port``."""

    field: str
    message: str
    code: str


def field_errors_view(errors: Iterable[FieldError]) -> list[FieldErrorShown]:
    return [{"field": error.field, "message": error.message, "code": error.code} for error in errors]


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


def respond(answer: Answer[Any], status: int, *, enveloped: bool) -> web.Response:
    """The HTTP answer.

    Args:
        enveloped: in the project family's envelope.
    """
    if status == 204:
        return web.Response(status=204, headers=answer.headers)
    value = answer.value
    response = json_response(
        {"success": True, "message": answer.message, "data": value} if enveloped else value,
        status,
        answer.version,
        embeds_others=answer.embeds_others,
    )
    response.headers.update(answer.headers)
    return response


def json_response(
    value: Any, status: int = 200, version: int | None = None, *, embeds_others: bool = False
) -> web.Response:
    """A value as JSON, with its entity's version as the ``ETag``; see ``Answer``."""
    body = dump(value)
    response = web.Response(status=status, body=body, content_type="application/json")
    if version is not None:
        digest = f".{hashlib.sha256(body).hexdigest()[:16]}" if embeds_others else ""
        response.headers["ETag"] = f'"{version}{digest}"'
        response.headers["Cache-Control"] = "private, no-cache"
    return response
