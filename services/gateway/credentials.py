"""Which credential of a request decides who sent it."""

from dataclasses import dataclass
from datetime import datetime

from aiohttp import web

from libs.contracts.internal import CredentialResolved
from libs.core.errors import DataSyncError, RetryLater, Unauthenticated
from libs.core.principal import Principal
from libs.core.text import is_text
from libs.web.requests import cookie_of
from services.gateway.credential_cache import Credential, CredentialCache

SESSION_COOKIE = "datasync_session"
OUR_PREFIX = "ds_"
CREDENTIAL_LENGTH_MAX = 1024


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Args:
        by_cookie: the browser added the credential by itself, so the request may not be what the user intends.
        expires_soon_at: when the API key's secret expires, None unless that is near.
    """

    principal: Principal
    by_cookie: bool
    expires_soon_at: datetime | None = None


class Credentials:
    """Resolves the credentials of requests."""

    def __init__(self, cache: CredentialCache) -> None:
        self._cache = cache

    def has_been_valid(self, request: web.Request) -> bool:
        """Whether a credential of the request was valid when it was last looked up."""
        return any(map(self._cache.was_valid, _presented(request)))

    async def caller_of(self, request: web.Request) -> Caller:
        """Who sent the request.

        A bearer token that does not have our format (OLake's page sends the literal ``authenticated``) is ignored if
        the session cookie is valid.

        Raises:
            Unauthenticated: no credential, or one that auth rejects.
            RetryLater: auth can't be reached.
        """
        bearer, session = _presented(request)
        if session.text and not bearer.text.startswith(OUR_PREFIX):
            resolved = await self._resolve(session)
            if resolved.principal is not None:
                return Caller(resolved.principal, by_cookie=True)
            if not bearer.text:
                raise _refusal(resolved)
        if not bearer.text:
            raise Unauthenticated(
                "authentication is required: send an API key, an OAuth or a session token in Authorization"
            )
        resolved = await self._resolve(bearer)
        if resolved.principal is None:
            raise _refusal(resolved)
        return Caller(resolved.principal, by_cookie=False, expires_soon_at=resolved.expires_soon_at)

    async def _resolve(self, credential: Credential) -> CredentialResolved:
        if len(credential.text) > CREDENTIAL_LENGTH_MAX or not is_text(credential.text):
            return CredentialResolved(principal=None, reason="unknown")
        try:
            return await self._cache.resolve(credential)
        except DataSyncError as error:
            raise RetryLater(
                "credentials can't be checked at the moment", code="auth_unavailable", retry_after_seconds=1
            ) from error


def _presented(request: web.Request) -> tuple[Credential, Credential]:
    """The bearer token and the session; empty if there is none."""
    bearer = _bearer_of(request.headers.get("Authorization", ""))
    return Credential("bearer", bearer), Credential("session", cookie_of(request, SESSION_COOKIE))


def _bearer_of(authorization: str) -> str:
    """``Bearer x`` and ``x`` alone are both ``x``: clients of the sync API send the bare key."""
    scheme, _, rest = authorization.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else authorization.strip()


def _refusal(resolved: CredentialResolved) -> Unauthenticated:
    reasons = {"expired": "has expired", "revoked": "was revoked"}
    reason = reasons.get(resolved.reason or "", "is not valid")
    return Unauthenticated(f"the credential {reason}", code="invalid_credential")
