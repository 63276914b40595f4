"""Routes: one declaration gives the path, the handler and the operation that the API's description shows.

``routes.post(path, self.create, "Create a job", tag="Jobs")``, where ``create(self, call: Call, body: JobBody) ->
Answer[JobShown]``: what a handler takes and returns is read from its signature. The body and the query are parsed into
their models before the handler runs, and its value becomes the answer in the family's shape.
"""

import hashlib
import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from aiohttp import web
from pydantic import BaseModel

from libs.core.idempotency import IdempotencyKey
from libs.web.answers import Answer, respond
from libs.web.calls import Call, ProjectFrom, Reader, call_of
from libs.web.conditions import if_match_of
from libs.web.errors import family_of
from libs.web.openapi import JSON, Content, DescribedRoute, Operation, ProjectId, Shape
from libs.web.requests import idempotency_of, read_body, read_query, read_query_or_body

CallHandler = Callable[..., Awaitable[Any]]
"""Takes a ``Call``, a ``body`` and a ``query`` if it needs them, and returns a value, an ``Answer`` or a response."""

_FROM_SIGNATURE: Final = object()


def route(
    method: str,
    path: str,
    handler: CallHandler,
    summary: str,
    *,
    tag: str,
    status: int = 200,
    answer: Shape = _FROM_SIGNATURE,
    also: Mapping[int, Content | tuple[Content, ...]] | None = None,
    body: Shape = _FROM_SIGNATURE,
    body_type: str = JSON,
    reads: Reader | None = None,
    query: Shape = _FROM_SIGNATURE,
    path_shapes: Mapping[str, Shape] | None = None,
    headers: Mapping[str, str] | None = None,
    refuses: Collection[int] = (),
    project_from: ProjectFrom | None = None,
    versioned: bool = False,
    conditional: bool = False,
    idempotent: bool = False,
    enveloped: bool | None = None,
    changes: bool | None = None,
) -> DescribedRoute:
    """A route. The first paragraph of its handler's docstring is the longer description.

    Args:
        answer: what a success holds, where the handler's signature does not say it: it returns a response of its own.
        also: further answers by status; more than one where a status comes in several media types.
        body: what the request must hold; described by it even where ``reads`` reads it into something else.
        body_type: the media type of the body.
        query: the model of the query.
        path_shapes: the shapes of parameters in the path; an integer where the route takes digits only, else text.
        headers: further request headers, by name with their descriptions.
        refuses: statuses besides those that follow from the rest.
        project_from: where the project is named; by default in the path, if it has a ``{projectid}``.
        versioned: answers carry an ``ETag`` and heed ``If-None-Match``.
        conditional: heeds ``If-Match``; ``idempotent``: heeds ``Idempotency-Key``.
        enveloped: in the project family's envelope; by default what the path says.
        changes: whether the route changes something; by default what the method says. A GET that does is not served
            to HEAD, and pages of other origins can't call it with a user's cookie.
    """
    signature = _Signature.of(handler)
    shown = signature.answer if answer is _FROM_SIGNATURE else answer
    usual = shown if isinstance(shown, Content) else Content(HTTPStatus(status).phrase, shown)
    answers: dict[int, tuple[Content, ...]] = {status: (usual,)}
    for other, content in (also or {}).items():
        answers[other] = answers.get(other, ()) + (content if isinstance(content, tuple) else (content,))
    described_query = signature.query if query is _FROM_SIGNATURE else query
    described_body = signature.body if body is _FROM_SIGNATURE else body
    operation = Operation(
        summary=summary,
        tag=tag,
        answers=answers,
        body=described_body,
        body_required=not signature.body_is_optional and method != "GET",
        body_type=body_type,
        # The fields of a GET may stand in its query or in its body.
        query=described_body if method == "GET" and described_body is not None else described_query,
        path={"projectid": ProjectId, **(path_shapes or {})},
        headers=headers or {},
        refuses=frozenset(refuses),
        versioned=versioned,
        conditional=conditional,
        idempotent=idempotent,
        enveloped=family_of(path) == "project" if enveloped is None else enveloped,
        changes=method != "GET" if changes is None else changes,
    )
    named = project_from or ("path" if "{projectid}" in path else "nowhere")
    door = _Door(handler, operation, signature, named, status, reads or _reader_of(method, signature, described_body))
    return DescribedRoute(web.RouteDef(method, path, door.answer, {}), operation, handler.__doc__)


get = partial(route, "GET")
post = partial(route, "POST")
put = partial(route, "PUT")
patch = partial(route, "PATCH")
delete = partial(route, "DELETE")


@dataclass(frozen=True, slots=True)
class _Signature:
    """What a handler takes and returns."""

    body: Shape
    body_is_optional: bool
    query: type[BaseModel] | None
    answer: Shape

    @classmethod
    def of(cls, handler: CallHandler) -> "_Signature":
        hints = get_type_hints(inspect.unwrap(handler), include_extras=True)
        body = hints.get("body")
        return cls(
            body=_without_none(body),
            body_is_optional=NoneType in get_args(body),
            query=hints.get("query"),
            answer=_value_of(hints["return"]),
        )


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (Union, UnionType):
        return hint
    kept = [item for item in get_args(hint) if item is not NoneType]
    return kept[0] if len(kept) == 1 else hint


def _value_of(hint: Any) -> Any:
    if hint is NoneType:
        return None
    if get_origin(hint) is Answer:
        return _value_of(get_args(hint)[0])
    return None if inspect.isclass(hint) and issubclass(hint, web.StreamResponse) else hint


def _reader_of(method: str, signature: _Signature, model: Any) -> Reader | None:
    if signature.body is None:
        return None
    read: Callable[[web.Request, Any], Awaitable[Any]] = read_query_or_body if method == "GET" else read_body
    if not signature.body_is_optional:
        return lambda request: read(request, model)

    async def read_if_any(request: web.Request) -> Any:
        return await read(request, model) if request.body_exists else None

    return read_if_any


@dataclass(frozen=True, slots=True)
class _Door:
    """Reads the request once, calls the handler and answers."""

    handler: CallHandler
    operation: Operation
    signature: _Signature
    project_from: ProjectFrom
    status: int
    read: Reader | None

    async def answer(self, request: web.Request) -> web.StreamResponse:
        call = call_of(request, self.project_from)
        given: dict[str, Any] = {}
        if self.signature.query is not None:
            given["query"] = read_query(request, self.signature.query)
        if self.read is not None:
            given["body"] = await self.read(request)
        if self.operation.conditional or self.operation.idempotent:
            call = replace(
                call,
                expected_version=if_match_of(request) if self.operation.conditional else None,
                idempotency=self._idempotency_of(call) if self.operation.idempotent else None,
            )
        found = await self.handler(call, **given)
        if isinstance(found, web.StreamResponse):
            return found
        answer = found if isinstance(found, Answer) else Answer(found)
        return respond(answer, self.status, enveloped=self.operation.enveloped)

    def _idempotency_of(self, call: Call) -> IdempotencyKey | None:
        key = idempotency_of(call.request)
        if key is None or self.project_from != "header":
            return key
        # The path does not name the project, so the same key under another project is another request.
        return replace(key, id=hashlib.sha256(f"{key.id}/{call.project_id}".encode()).hexdigest())
