"""What a request says: its caller, its body and query as models, its conditions and Idempotency-Key."""

import hashlib
import hmac
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from aiohttp import web
from pydantic import BaseModel, ValidationError

from libs.core.errors import (
    FieldError,
    InvalidInput,
    Unauthenticated,
    UnsupportedMediaType,
)
from libs.core.idempotency import IdempotencyKey
from libs.core.json import parse_json
from libs.core.principal import Principal
from libs.core.text import is_text, readable
from libs.core.validation import field_errors
from libs.web.body import BODY, read_bytes

IDEMPOTENCY_KEY_LENGTH_MAX = 255

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
CLIENT_ADDRESS: web.RequestKey[str] = web.RequestKey("client_address", str)
PRINCIPAL: web.RequestKey[Principal] = web.RequestKey("principal", Principal)

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_raw_json(request: web.Request) -> Any:
    """The body as strict JSON.

    Raises:
        UnsupportedMediaType: the content type is not JSON.
        InvalidInput: not JSON, or JSON that breaks a rule of ``libs.core.json``.
        TooLarge: over the limit.
    """
    require_json(request)
    return parse_json(await read_bytes(request))


async def read_body(request: web.Request, model: type[ModelT]) -> ModelT:
    """The JSON body as a model; ``InvalidInput`` names every field that is missing, unknown or wrong."""
    await read_raw_json(request)
    try:
        return model.model_validate_json(request[BODY], strict=True)
    except ValidationError as error:
        raise invalid_input(error) from None


def read_query(request: web.Request, model: type[ModelT]) -> ModelT:
    """The query parameters as a model; a parameter given twice is refused."""
    return _model_of_query(_query_of(request), model)


async def read_query_or_body(request: web.Request, model: type[ModelT]) -> ModelT:
    """The fields of a GET that may stand in the query or in a JSON body.

    Raises:
        InvalidInput: both name a field and differ, or ``config`` stands in the query.
    """
    query = _query_of(request)
    if "config" in query:
        raise invalid_field(
            "config", "must not be in the query, which logs and browser histories keep; send it in the body"
        )
    if not request.body_exists or not await read_bytes(request):
        return _model_of_query(query, model)
    body = await read_raw_json(request)
    if not isinstance(body, dict):
        return await read_body(request, model)
    for name, value in query.items():
        if name in body and str(body[name]) != value:
            raise invalid_field(name, "differs between the query and the body")
    _require_plain_numbers(query, model)
    fields = {**query, **{name: value for name, value in body.items() if value is not None}}
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid_input(error) from None


def invalid_input(error: ValidationError) -> InvalidInput:
    """The refusal of what Pydantic found."""
    found = field_errors(error)
    message = "; ".join(f"{item.field or 'the body'}: {item.message}" for item in found[:5])
    return InvalidInput(message, errors=found)


def require_json(request: web.Request) -> None:
    """Raises ``UnsupportedMediaType`` unless the content type is JSON in UTF-8."""
    content_type = request.content_type if "Content-Type" in request.headers else "absent"
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise UnsupportedMediaType(f"the content type must be application/json, and it is {content_type[:64]}")
    charset = request.charset
    if charset is not None and charset.lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(f"JSON is UTF-8, and the charset says {charset[:32]}")


def _query_of(request: web.Request) -> dict[str, str]:
    query = request.query
    for name, value in query.items():
        if not (is_text(name) and is_text(value)):
            raise invalid_field(readable(name)[:64], "is not UTF-8")
        if len(query.getall(name)) > 1:
            raise invalid_field(name, "occurs twice in the query")
    return dict(query)


def _model_of_query(query: Mapping[str, str], model: type[ModelT]) -> ModelT:
    _require_plain_numbers(query, model)
    try:
        return model.model_validate(query)
    except ValidationError as error:
        raise invalid_input(error) from None


_PLAIN_NUMBER = {int: re.compile(r"-?[0-9]{1,19}"), float: re.compile(r"-?[0-9]{1,19}(?:\.[0-9]{1,19})?")}


def _require_plain_numbers(query: Mapping[str, str], model: type[BaseModel]) -> None:
    """Refuse ``1_0``, ``+1``, ``1.0`` and spaces, which pydantic would accept."""
    for name, (kind, texts) in _numbers_of(model).items():
        value = query.get(name)
        if value is not None and value not in texts and _PLAIN_NUMBER[kind].fullmatch(value) is None:
            raise invalid_field(name, "must be an integer" if kind is int else "must be a number")


@lru_cache(maxsize=256)
def _numbers_of(model: type[BaseModel]) -> Mapping[str, tuple[type, frozenset[str]]]:
    """The numeric fields with the literal texts that each also accepts; fields that accept any text are left out."""
    found: dict[str, tuple[type, frozenset[str]]] = {}
    for name, field in model.model_fields.items():
        kinds = list(_kinds_of(field.annotation))
        number = next((kind for kind in (int, float) if kind in kinds), None)
        if number is not None and str not in kinds:
            found[field.alias or name] = (number, frozenset(kind for kind in kinds if isinstance(kind, str)))
    return found


def _kinds_of(annotation: Any) -> Iterator[Any]:
    """The types and the literal values that an annotation is made of."""
    origin = get_origin(annotation)
    if origin is None:
        yield annotation
    elif origin is Annotated:
        yield from _kinds_of(get_args(annotation)[0])
    elif origin is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _kinds_of(part)


def invalid_field(field: str, message: str, code: str = "invalid") -> InvalidInput:
    """The refusal of one field or header."""
    return InvalidInput(f"{field}: {message}", errors=[FieldError(field, message, code)])


def principal_of(request: web.Request) -> Principal:
    """Who is calling; ``Unauthenticated`` on a public path without a credential."""
    principal: Principal | None = request.get(PRINCIPAL)
    if principal is None:
        raise Unauthenticated("authentication is required")
    return principal


def idempotency_key_of(request: web.Request) -> str | None:
    """The text of the request's ``Idempotency-Key``."""
    keys = request.headers.getall("Idempotency-Key", ())
    if not keys:
        return None
    if len(keys) > 1:
        raise invalid_field("Idempotency-Key", "occurs twice")
    key = keys[0]
    if not 1 <= len(key) <= IDEMPOTENCY_KEY_LENGTH_MAX or not key.isascii() or not key.isprintable():
        raise invalid_field("Idempotency-Key", f"must be 1 to {IDEMPOTENCY_KEY_LENGTH_MAX} printable ASCII characters")
    return key


def cookie_of(request: web.Request, name: str) -> str:
    """A cookie's value, empty if it is missing or not UTF-8; the first one if there are two (RFC 6265 section 5.4).

    Cookies may come on several lines, as a proxy for HTTP/2 leaves them (RFC 9113 section 8.2.3).
    """
    if "Cookie" not in request.headers:
        return ""
    for line in request.headers.getall("Cookie"):
        for pair in line.split(";"):
            found, separator, value = pair.strip().partition("=")
            if separator and found == name:
                value = value.strip().removeprefix('"').removesuffix('"')
                return value if is_text(value) else ""
    return ""


def idempotency_of(request: web.Request, body: bytes | None = None) -> IdempotencyKey | None:
    """The request's ``Idempotency-Key``, made unique to the caller, the method and the path.

    Args:
        body: what has to be equal when the key is used again; by default the body that was read.
    """
    key = idempotency_key_of(request)
    if key is None:
        return None
    principal = request.get(PRINCIPAL)
    caller = ("anonymous", "") if principal is None else (principal.kind, principal.subject)
    parts = (*caller, request.method, request.path, key)
    identity = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
    content = request.get(BODY, b"") if body is None else body
    # The key of this HMAC is not stored, so a password in the body can't be guessed from the stored hash.
    return IdempotencyKey(identity, hmac.digest(key.encode(), content, "sha256").hex())
