"""Bodies and queries: the bounds and shapes of every field."""

import re
from typing import Annotated, Literal
from urllib.parse import parse_qsl

from aiohttp import web
from pydantic import AfterValidator, BaseModel, Field, StringConstraints

from libs.contracts.auth import Plan
from libs.core.errors import FixRequest, UnsupportedMediaType
from libs.core.principal import Role
from libs.web.body import read_bytes
from libs.web.inputs import NUMBER_MAX, Body, Query, StrictBody, StrictQuery
from services.auth.domain.scopes import Permission

PASSWORD_LENGTH_MAX = 1024
LOGIN_LENGTH_MAX = 320
KEYS_LISTED_MAX = 1_000
FORM = "application/x-www-form-urlencoded"
FORM_FIELDS_MAX = 50
LIFETIME_DAYS_MAX = 3650
OVERLAP_SECONDS_DEFAULT = 24 * 60 * 60
OVERLAP_SECONDS_MAX = 30 * 24 * 60 * 60

_USERNAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_EMAIL = re.compile(r"[^@\s\x00-\x1f\x7f]{1,64}@[^@\s\x00-\x1f\x7f.]+(\.[^@\s\x00-\x1f\x7f.]+)+")


def _valid_username(value: str) -> str:
    if not _USERNAME.fullmatch(value):
        raise ValueError("may hold letters, digits, '.', '_' and '-', and begins with a letter or a digit")
    return value


def _valid_email(value: str) -> str:
    if not _EMAIL.fullmatch(value):
        raise ValueError("is not an e-mail address such as ada@example.com")
    return value


Username = Annotated[
    str,
    StringConstraints(min_length=3, max_length=64),
    AfterValidator(_valid_username),
    Field(examples=["ann"], json_schema_extra={"pattern": f"^{_USERNAME.pattern}$"}),
]
Email = Annotated[
    str,
    StringConstraints(max_length=254),
    AfterValidator(_valid_email),
    Field(examples=["ann@example.com"], json_schema_extra={"format": "email"}),
]
Password = Annotated[
    str,
    StringConstraints(min_length=8, max_length=PASSWORD_LENGTH_MAX),
    Field(examples=["correct horse"], json_schema_extra={"format": "password"}),
]


class SignupBody(Body):
    email: Email
    username: Username
    password: Password


class LoginBody(Body):
    """A name or password that breaks the rules of signing up is wrong, not malformed."""

    username: str = Field(max_length=LOGIN_LENGTH_MAX, examples=["ann"])
    password: str = Field(max_length=PASSWORD_LENGTH_MAX, examples=["correct horse"])


class NewUserBody(SignupBody):
    """``project_id`` is optional for callers that have only one project."""

    role: Role = "member"
    project_id: int | None = None


class UserChangeBody(Body):
    """Absent fields stay as they are; ``username`` is accepted for forms that send the whole user.

    Users who change their own password send the present one too, in ``current_password``.
    """

    username: str | None = None
    email: Email | None = None
    password: Password | None = None
    current_password: str | None = Field(default=None, max_length=PASSWORD_LENGTH_MAX, examples=["correct horse"])


class NewKeyBody(StrictBody):
    """``scopes`` left out: all that the permission allows; empty: none. Only operators raise ``plan``."""

    name: str = Field(min_length=1, max_length=128, examples=["nightly export"])
    permission: Permission = "read-write"
    scopes: tuple[str, ...] | None = Field(default=None, max_length=64)
    expires_in_days: int = Field(default=90, ge=1, le=LIFETIME_DAYS_MAX)
    project_id: int | None = None
    developer_id: str | None = Field(default=None, min_length=1, max_length=128)
    plan: Plan = "standard"


class KeyChangeBody(StrictBody):
    name: str = Field(min_length=1, max_length=128)


class RotationBody(StrictBody):
    """``overlap_seconds``: how long the former secret stays good; ``expires_in_days``: of the new one."""

    overlap_seconds: int = Field(default=OVERLAP_SECONDS_DEFAULT, ge=0, le=OVERLAP_SECONDS_MAX)
    expires_in_days: int | None = Field(default=None, ge=1, le=LIFETIME_DAYS_MAX)


class NewClientBody(StrictBody):
    """``scopes`` left out: all; empty: none. Only operators raise ``plan``."""

    name: str = Field(min_length=1, max_length=128, examples=["nightly import"])
    scopes: tuple[str, ...] | None = Field(default=None, max_length=64, examples=[["sync:read"]])
    project_id: int | None = None
    developer_id: str | None = Field(default=None, min_length=1, max_length=128)
    plan: Plan = "standard"


class TokenForm(BaseModel):
    """``client_id`` and ``client_secret`` are here or in an ``Authorization: Basic`` header."""

    grant_type: Literal["client_credentials"]
    scope: str | None = Field(default=None, examples=["sync:read sync:write"])
    client_id: str | None = None
    client_secret: str | None = None


class ProjectQuery(Query):
    project_id: int | None = None


class KeysQuery(StrictQuery):
    limit: int = Field(default=100, ge=1, le=KEYS_LISTED_MAX)
    offset: int = Field(default=0, ge=0, le=NUMBER_MAX)
    project_id: int | None = None


async def read_form(request: web.Request) -> dict[str, str]:
    """The parameters of a form; empty ones count as absent (RFC 6749 section 3.2).

    Raises:
        UnsupportedMediaType: the body is no form.
        FixRequest: a parameter occurs twice, or in the URL, where logs would keep it.
    """
    if request.query:
        raise FixRequest("parameters belong in the body, never in the URL", code="invalid_request")
    if request.content_type != FORM:
        raise UnsupportedMediaType(f"the content type must be {FORM}", code="invalid_request")
    body = await read_bytes(request)
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=FORM_FIELDS_MAX, errors="strict")
    except ValueError:
        raise FixRequest("the body is not a form in UTF-8", code="invalid_request") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise FixRequest("a parameter occurs twice", code="invalid_request")
    return {name: value for name, value in form.items() if value}
