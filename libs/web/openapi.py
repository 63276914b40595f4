"""The API's description (OpenAPI 3.1), made of the operations that routes declare (``libs.web.routes``).

The routes of a service make one part of the document; the gateway merges the parts. What every operation shares (errors
in the family's shape, headers, conditional requests) is added here.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, Literal, NotRequired

from aiohttp import web
from pydantic import BaseModel, Field, GetJsonSchemaHandler, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema
from pydantic_core.core_schema import TypedDictSchema
from typing_extensions import TypedDict

from libs.core.scopes import SCOPES
from libs.web.answers import FieldErrorShown
from libs.web.errors import PROBLEM, family_of
from libs.web.scopes import scope_of

Json = dict[str, Any]
Shape = Any
"""A pydantic model, or any annotation that pydantic knows: ``list[SourceShown]``."""

OPENAPI_VERSION = "3.1.0"
COMPONENTS = "#/components/schemas/"
JSON = "application/json"

ProjectId = Annotated[int, Field(ge=1, le=2**53, description="Projects count from 123.", examples=[123])]


@dataclass(frozen=True, slots=True)
class ReadAs:
    """Describes a field that the body's model accepts as any JSON by the model that the handler validates it with."""

    shape: Shape

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        return handler(TypeAdapter(self.shape).core_schema)


_METHODS = ("get", "put", "post", "patch", "delete")
_SERVED = frozenset({429, 500, 503, 504})
_DESCRIPTIONS = {
    304: "The caller already has this version.",
    400: "The request is malformed, or a field is missing, unknown or out of its bounds.",
    401: "The credential is missing or not valid.",
    403: "The credential is valid but does not permit this.",
    404: "It does not exist in the caller's projects.",
    408: "The body did not arrive in time.",
    409: "The request conflicts with the current state, or a unique name is taken.",
    412: "`If-Match` names a version that is no longer the current one.",
    413: "The body exceeds its limit, measured after decompression.",
    415: "The body's media type or encoding is not supported.",
    422: "The `Idempotency-Key` was used with another body.",
    429: "Too many requests.",
    500: "Something went wrong on the server's side.",
    503: "The request is valid but can't be processed now; it is safe to retry.",
    504: "A service or a remote database did not answer in time.",
}

_REFUSED_FOR_EXAMPLE = {
    400: ("validation_error", "name: is required"),
    401: ("unauthenticated", "authentication is required"),
    403: ("insufficient_scope", "this credential lacks the scope sync:write"),
    404: ("not_found", "record 01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10 does not exist"),
    408: ("request_timeout", "the request body did not arrive in time"),
    409: ("already_exists", "the name is already taken"),
    412: ("precondition_failed", "the current version is 3, not 2"),
    413: ("too_large", "the request body is over 1048576 bytes"),
    415: ("unsupported_media_type", "the content type must be application/json, and it is text/plain"),
    422: ("idempotency_key_reused", "this Idempotency-Key was used with another request"),
    429: ("rate_limited", "1000 requests a minute are allowed; the next is in 12 seconds"),
    500: ("internal_error", "something went wrong on our side"),
    503: ("service_unavailable", "the service catalog is not available at the moment"),
    504: ("gateway_timeout", "no answer within 30 seconds"),
}


class ProjectError(TypedDict):
    """An error of the project family."""

    success: Literal[False]
    message: Annotated[str, Field(examples=["name: is required"])]
    code: Annotated[str, Field(examples=["validation_error"])]
    errors: NotRequired[list[FieldErrorShown]]


class V2Error(TypedDict):
    """An error of the v2 family."""

    error: Annotated[str, Field(examples=["Bad Request"])]
    message: Annotated[str, Field(examples=["name: is required"])]
    code: Annotated[str, Field(examples=["validation_error"])]
    errors: NotRequired[list[FieldErrorShown]]


class OAuthError(TypedDict):
    """An error of the token endpoint (RFC 6749 section 5.2)."""

    error: Annotated[str, Field(examples=["invalid_client"])]
    error_description: Annotated[str, Field(examples=["the client or its secret is wrong"])]


class Problem(TypedDict):
    """Problem details (RFC 9457): the sync family's errors, and any other's on ``Accept: application/problem+json``."""

    type: Annotated[str, Field(examples=["about:blank"])]
    title: Annotated[str, Field(examples=["Bad Request"])]
    status: Annotated[int, Field(ge=400, le=599, examples=[400])]
    detail: Annotated[str, Field(examples=["developerId: is required"])]
    code: Annotated[str, Field(examples=["validation_error"])]
    request_id: Annotated[str, Field(examples=["01980f0a-7c1e-7d54-9f2b-1f2e5a7c9d10"])]
    errors: list[FieldErrorShown]


_ERROR_SHAPES: Mapping[str, Shape] = {
    "project": ProjectError,
    "v2": V2Error,
    "sync": Problem,
    "oauth": OAuthError,
    "internal": ProjectError,
}


@dataclass(frozen=True, slots=True)
class Content:
    """An answer that is not the usual one.

    Args:
        shape: None where it has no body; ``bytes`` and ``str`` for what is not JSON.
        headers: names of further headers that it always has.
    """

    description: str
    shape: Shape = None
    media_type: str = JSON
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """What a route promises; ``libs.web.routes.route`` says what each part means."""

    summary: str
    tag: str
    answers: Mapping[int, tuple[Content, ...]]
    body: Shape
    body_required: bool
    body_type: str
    query: type[BaseModel] | None
    path: Mapping[str, Shape]
    headers: Mapping[str, str]
    refuses: frozenset[int]
    versioned: bool
    conditional: bool
    idempotent: bool
    enveloped: bool
    changes: bool


class DescribedRoute(web.RouteDef):
    """A route with its description."""

    operation: Operation
    text: str | None

    def __init__(self, route: web.RouteDef, operation: Operation, text: str | None) -> None:
        # HEAD must be safe, but would run the handler of its GET.
        kwargs = route.kwargs | {"allow_head": False} if route.method == "GET" and operation.changes else route.kwargs
        super().__init__(route.method, route.path, route.handler, kwargs)
        object.__setattr__(self, "operation", operation)
        object.__setattr__(self, "text", text)


def part_of(routes: Iterable[web.AbstractRouteDef], public_paths: Collection[str], *, is_served: bool = True) -> Json:
    """One service's part of the document: ``paths``, ``components`` and ``tags``.

    Args:
        public_paths: paths that need no credential.
        is_served: False for the gateway's own operations, which have no rate limit and no service behind them.
    """
    described = [route for route in routes if isinstance(route, DescribedRoute)]
    schemas = _Schemas(described)
    paths: dict[str, Json] = {}
    responses: Json = {}
    for route in described:
        writer = _Writer(route, schemas, responses, is_public=route.path in public_paths, is_served=is_served)
        paths.setdefault(template_of(route.path), {})[route.method.lower()] = writer.operation()
    tags = [{"name": name} for name in dict.fromkeys(route.operation.tag for route in described)]
    named = schemas.used_by([paths, responses])
    return {"paths": paths, "components": {"schemas": named, "responses": responses}, "tags": tags}


def merged(parts: Sequence[Json], *, version: str) -> Json:
    """The whole document; where two parts define the same name, the first one wins."""
    document: Json = {
        "openapi": OPENAPI_VERSION,
        "info": {"title": "DataSync", "version": version, "summary": _SUMMARY, "description": _DESCRIPTION},
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"session": []}],
        "tags": [],
        "paths": {},
        "components": {"schemas": {}, "responses": {}, "securitySchemes": dict(_SECURITY_SCHEMES)},
    }
    for part in parts:
        known_tags = {tag["name"] for tag in document["tags"]}
        document["tags"] += [tag for tag in part["tags"] if tag["name"] not in known_tags]
        for path, item in part["paths"].items():
            document["paths"][path] = {**item, **document["paths"].get(path, {})}
        for kind in ("schemas", "responses"):
            document["components"][kind] = {**part["components"][kind], **document["components"][kind]}
    if "/oauth/token" in document["paths"]:
        document["components"]["securitySchemes"]["oauth2"] = _OAUTH2
        document["security"].append({"oauth2": []})
    return document


def template_of(path: str) -> str:
    """The path of an aiohttp route as OpenAPI writes it: ``{id:\\d+}`` is ``{id}``."""
    return "".join(f"{{{part[0]}}}" if isinstance(part, tuple) else part for part in _parsed(path))


_SUMMARY = "Replicate databases on a schedule, keep developers' sync records: one REST API."
_DESCRIPTION = """\
Every answer has an `X-Request-Id`. Bodies are JSON in UTF-8 and may come with `Content-Encoding: gzip` or `deflate`;
answers are compressed on `Accept-Encoding: gzip`, with an `ETag` of their own. Pages shift while others write; the
change feed of records does not. Timestamps are ISO 8601 in UTC. Errors have the shape of their family, and that of
RFC 9457 everywhere on `Accept: application/problem+json`. `Idempotency-Key` on a POST makes repeating it safe for 24
hours. A key may be sent as `Authorization: Bearer <key>` or raw in `Authorization`. `x-required-scope` is the scope
that a key or an OAuth token needs for an operation; null where any will do."""

_SECURITY_SCHEMES: Json = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, an OAuth token, or the token that `POST /login` answers.",
    },
    "session": {
        "type": "apiKey",
        "in": "cookie",
        "name": "datasync_session",
        "description": "The cookie that `POST /login` sets; calls that change something also need an allowed `Origin`.",
    },
}
_OAUTH2: Json = {
    "type": "oauth2",
    "description": "Client credentials (RFC 6749 section 4.4).",
    "flows": {
        "clientCredentials": {
            "tokenUrl": "/oauth/token",
            "scopes": {scope: "To {1} {0}.".format(*scope.split(":")) for scope in SCOPES},
        }
    },
}

_RESPONSE_HEADERS: Mapping[str, Json] = {
    "X-Request-Id": {
        "schema": {"type": "string", "minLength": 1},
        "description": "Identifies the request in the logs.",
    },
    "ETag": {"schema": {"type": "string"}, "description": "The version, for `If-Match` and `If-None-Match`."},
    "Location": {"schema": {"type": "string"}, "description": "Where the new thing is."},
    "Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait."},
    "WWW-Authenticate": {"schema": {"type": "string"}, "description": "RFC 6750 section 3."},
    "Set-Cookie": {"schema": {"type": "string"}, "description": "The session."},
    "Content-Disposition": {"schema": {"type": "string"}, "description": "The file's name."},
    "Content-Range": {"schema": {"type": "string"}, "description": "Which part this is (RFC 9110 section 14.4)."},
    "X-DataSync-Key-Expires": {
        "schema": {"type": "string", "format": "date-time"},
        "description": "When the API key that was sent expires; sent in its last seven days: rotate it.",
    },
    "X-RateLimit-Limit": {"schema": {"type": "integer"}, "description": "Requests in a window."},
    "X-RateLimit-Remaining": {"schema": {"type": "integer"}, "description": "Requests left in this window."},
    "X-RateLimit-Reset": {"schema": {"type": "integer"}, "description": "When the next window begins, epoch seconds."},
    "X-RateLimit-Mode": {
        "schema": {"const": "local"},
        "description": "The store does not answer: this gateway limits on its own meanwhile.",
    },
    "RateLimit": {"schema": {"type": "string"}, "description": "What is left of the policy, and for how long."},
    "RateLimit-Policy": {"schema": {"type": "string"}, "description": "The policy that the request counts under."},
}
_RESPONSE_HEADERS_OF_KEYS = ("X-DataSync-Key-Expires",)
_RATE_LIMIT_HEADERS = (
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
    "X-RateLimit-Mode",
    "RateLimit",
    "RateLimit-Policy",
)


class _ClosedDicts(GenerateJsonSchema):
    """Answers hold no field that is not described."""

    def typed_dict_schema(self, schema: TypedDictSchema) -> Json:
        return {**super().typed_dict_schema(schema), "additionalProperties": False}


class _Schemas:
    """The JSON Schemas of every shape of a service, its models as named components."""

    def __init__(self, routes: Sequence[DescribedRoute]) -> None:
        shapes: dict[int, Shape] = {id(shape): shape for route in routes for shape in _shapes_of(route.operation)}
        self._shapes = shapes  # keeps every shape alive, so that its id stays its own
        adapters = [(key, "validation", TypeAdapter(shape)) for key, shape in shapes.items()]
        found, top = TypeAdapter.json_schemas(
            adapters,  # type: ignore[arg-type]
            ref_template=COMPONENTS + "{model}",
            schema_generator=_ClosedDicts,
        )
        self._found = {key: schema for (key, _), schema in found.items()}
        self.definitions: Json = top.get("$defs", {})

    def of(self, shape: Shape) -> Json:
        return dict(self._found[id(shape)])

    def resolved(self, schema: Json) -> Json:
        """The schema itself, behind its reference, with what stands beside that."""
        name = schema.get("$ref", "").removeprefix(COMPONENTS)
        if not name:
            return schema
        return {**self.definitions[name], **{key: value for key, value in schema.items() if key != "$ref"}}

    def used_by(self, node: Any) -> Json:
        """The definitions that a node refers to, directly or indirectly."""
        used: set[str] = set()
        waiting = _referred_to(node)
        while waiting:
            name = waiting.pop()
            if name not in used:
                used.add(name)
                waiting |= _referred_to(self.definitions[name])
        return {name: schema for name, schema in self.definitions.items() if name in used}

    def example(self, schema: Json) -> Any:
        """The schema's first example, or one composed of the examples of its parts."""
        schema = self.resolved(schema)
        for key in ("examples", "enum"):
            if schema.get(key):
                return schema[key][0]
        for key in ("const", "default"):
            if key in schema:
                return schema[key]
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self.example(schema[key][0])
        match schema.get("type"):
            case "object":
                return self._object_example(schema)
            case "array":
                return [self.example(schema["items"])] if schema.get("items") else []
            case "integer" | "number":
                return schema.get("minimum", 1)
            case "boolean":
                return True
            case "string":
                return "2026-01-01T12:00:00.000Z" if schema.get("format") == "date-time" else "text"
            case _:
                return None if schema.get("type") == "null" else {}

    def _object_example(self, schema: Json) -> Json:
        required = schema.get("required", ())
        return {
            name: self.example(item)
            for name, item in schema.get("properties", {}).items()
            if name in required or self.resolved(item).get("examples")
        }


def _shapes_of(operation: Operation) -> Iterator[Shape]:
    yield from (Problem, *_ERROR_SHAPES.values())
    yield from operation.path.values()
    yield from (shape for shape in (operation.body, operation.query) if shape is not None)
    for contents in operation.answers.values():
        yield from (item.shape for item in contents if item.shape is not None)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes one operation; answers that many operations share go to ``responses``."""

    route: DescribedRoute
    schemas: _Schemas
    responses: Json
    is_public: bool
    is_served: bool
    parsed: Sequence[str | tuple[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parsed", _parsed(self.route.path))

    def operation(self) -> Json:
        described = self.route.operation
        written: Json = {"operationId": _operation_id(self.route), "summary": described.summary}
        if text := _first_paragraph(self.route.text):
            written["description"] = text
        written["tags"] = [described.tag]
        if self.is_public:
            written["security"] = []
        elif self.is_served:
            written["x-required-scope"] = scope_of(template_of(self.route.path), changes=described.changes)
        if parameters := [*self._path_parameters(), *self._query_parameters(), *self._header_parameters()]:
            written["parameters"] = parameters
        if described.body is not None:
            content = {described.body_type: self._media(self.schemas.of(described.body))}
            written["requestBody"] = {"required": described.body_required, "content": content}
        written["responses"] = self._responses()
        return written

    def _path_parameters(self) -> Iterator[Json]:
        for part in self.parsed:
            if isinstance(part, tuple):
                name, pattern = part
                shape = self.route.operation.path.get(name)
                known = self.schemas.of(shape) if shape is not None else None
                default: Json = (
                    {"type": "integer", "minimum": 0} if pattern == r"\d+" else {"type": "string", "minLength": 1}
                )
                schema: Json = known or default
                parameter = {"name": name, "in": "path", "required": True, "schema": schema}
                # The page fills a field in from the parameter's own example alone.
                yield {**parameter, "example": schema["examples"][0]} if schema.get("examples") else parameter

    def _query_parameters(self) -> Iterator[Json]:
        if self.route.operation.query is None:
            return
        model = self.schemas.resolved(self.schemas.of(self.route.operation.query))
        for name, schema in model.get("properties", {}).items():
            shown = _not_null({key: value for key, value in schema.items() if key != "title"})
            parameter: Json = {"name": name, "in": "query", "required": name in model.get("required", ())}
            if "description" in shown:
                parameter["description"] = shown.pop("description")
            yield {**parameter, "schema": shown}

    def _header_parameters(self) -> Iterator[Json]:
        described = self.route.operation
        known = {
            "If-None-Match": (described.versioned, "The `ETag` that the caller has: 304 if it is still current."),
            "If-Match": (
                described.conditional,
                "The `ETag` that the change is based on: 412 if it is no longer current.",
            ),
            "Idempotency-Key": (described.idempotent, "Unique to this request; a repetition gets the first answer."),
        }
        wanted = {name: text for name, (is_wanted, text) in known.items() if is_wanted}
        for name, text in {**wanted, **described.headers}.items():
            yield {"name": name, "in": "header", "description": text, "schema": {"type": "string"}}

    def _responses(self) -> Json:
        described = self.route.operation
        written = {str(status): self._answer(status, contents) for status, contents in described.answers.items()}
        if described.versioned and self.route.method == "GET":
            written["304"] = {"description": _DESCRIPTIONS[304], "headers": self._headers(required=("ETag",))}
        for status in sorted(self._refusals() - described.answers.keys()):
            name = f"{family_of(self.route.path)}-{status}"
            self.responses.setdefault(name, self._refusal(status))
            written[str(status)] = {"$ref": f"#/components/responses/{name}"}
        return written

    def _refusals(self) -> frozenset[int]:
        described = self.route.operation
        has_input = described.body is not None or described.query is not None or described.headers
        return described.refuses.union(
            _SERVED if self.is_served else (500,),
            () if self.is_public else (401, 403),
            (400,) if self.is_served or has_input else (),
            (404,) if any(isinstance(part, tuple) for part in self.parsed) else (),
            (408, 413, 415) if described.body is not None else (),
            (412,) if described.conditional else (),
            (409, 422) if described.idempotent else (),
        )

    def _answer(self, status: int, contents: Sequence[Content]) -> Json:
        always = {name for content in contents for name in content.headers}
        if self.route.operation.versioned and 200 <= status < 300 and self.route.operation.query is None:
            always.add("ETag")
        possible = ("ETag",) if self.route.operation.versioned else ()
        written: Json = {
            "description": contents[0].description,
            "headers": self._headers(required=sorted(always), possible=possible),
        }
        content = {item.media_type: self._content(item) for item in contents if item.shape is not None}
        return {**written, "content": content} if content else written

    def _content(self, content: Content) -> Json:
        if content.shape is bytes:
            return {"schema": {"type": "string", "contentMediaType": content.media_type}}
        if content.media_type != JSON:
            return {"schema": {"type": "string"}}
        schema = self.schemas.of(content.shape)
        return self._media(_enveloped(schema) if self.route.operation.enveloped else schema)

    def _refusal(self, status: int) -> Json:
        shape = _ERROR_SHAPES[family_of(self.route.path)]
        required = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}.get(status, ())
        content = {} if shape is Problem else {JSON: self._refused(status, shape)}
        return {
            "description": _DESCRIPTIONS.get(status, HTTPStatus(status).phrase),
            "headers": self._headers(required=required),
            "content": {**content, PROBLEM: self._refused(status, Problem)},
        }

    def _refused(self, status: int, shape: Shape) -> Json:
        """The schema of an error with an example of this status."""
        phrase = HTTPStatus(status).phrase
        code, message = _REFUSED_FOR_EXAMPLE.get(status, ("error", phrase))
        if shape is OAuthError:
            told: Json = {
                "error": "invalid_client" if status == 401 else "invalid_request",
                "error_description": message,
            }
        else:
            told = {
                "message": message,
                "code": code,
                "error": phrase,
                "title": phrase,
                "status": status,
                "detail": message,
            }
        schema = self.schemas.of(shape)
        example = self.schemas.example(schema)
        return {"schema": schema, "example": {name: told.get(name, value) for name, value in example.items()}}

    def _media(self, schema: Json) -> Json:
        return {"schema": schema, "example": self.schemas.example(schema)}

    def _headers(self, *, required: Sequence[str], possible: Sequence[str] = ()) -> Json:
        always = ("X-Request-Id", *required)
        served = (*_RATE_LIMIT_HEADERS, *_RESPONSE_HEADERS_OF_KEYS) if self.is_served else ()
        optional = [name for name in (*possible, *served) if name not in always]
        return {name: {**_RESPONSE_HEADERS[name], "required": True} for name in always} | {
            name: dict(_RESPONSE_HEADERS[name]) for name in optional
        }


def _referred_to(node: Any) -> set[str]:
    match node:
        case dict():
            own = {str(node["$ref"]).removeprefix(COMPONENTS)} if "$ref" in node else set()
            found = own.union(*map(_referred_to, node.values()))
        case list():
            found = set().union(*map(_referred_to, node))
        case _:
            found = set()
    return {name for name in found if "/" not in name}


def _enveloped(schema: Json) -> Json:
    return {
        "type": "object",
        "properties": {"success": {"const": True}, "message": {"type": "string", "examples": [""]}, "data": schema},
        "required": ["success", "message", "data"],
        "additionalProperties": False,
    }


def _not_null(schema: Json) -> Json:
    """A parameter is there or is not; it can't be null."""
    choices = [item for item in schema.get("anyOf", ()) if item.get("type") != "null"]
    if "anyOf" in schema:
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        schema = {**rest, **choices[0]} if len(choices) == 1 else {**rest, "anyOf": choices}
    return {key: value for key, value in schema.items() if not (key == "default" and value is None)}


def _parsed(path: str) -> Sequence[str | tuple[str, str]]:
    """The path's texts and its parameters with their patterns, which may hold braces of their own."""
    parts: list[str | tuple[str, str]] = []
    depth, start = 0, 0
    for index, character in enumerate(path):
        if character == "{":
            if depth == 0:
                parts.append(path[start:index])
                start = index + 1
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                name, _, pattern = path[start:index].partition(":")
                parts.append((name, pattern))
                start = index + 1
    return [part for part in (*parts, path[start:]) if part]


def _operation_id(route: web.RouteDef) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "_", template_of(route.path)).strip("_")
    return f"{route.method.lower()}_{words}"


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())
