"""Who holds a credential: asked of auth, remembered for less than a second.

An answer is used for 800 ms from the moment that it was asked for, so that what was revoked is refused within a second
whatever else is down; one that is in use is asked for again in the background from its middle on, so that a busy key
never waits. Concurrent requests with one credential ask once.
"""

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import structlog
from aiohttp import web

from libs.contracts.internal import RESOLVE_CREDENTIAL, CredentialPresented, CredentialResolved
from libs.core.errors import DataSyncError, RetryLater, Unauthenticated
from libs.core.principal import Principal
from libs.core.text import is_text
from libs.web.internal import InternalClient
from libs.web.requests import cookie_of

SESSION_COOKIE = "datasync_session"
OUR_PREFIX = "ds_"

USED_SECONDS = 0.8
REFRESHED_SECONDS = 0.4
CACHED_MAX = 10_000
CREDENTIAL_LENGTH_MAX = 1024


log = structlog.get_logger(__name__)

Kind = Literal["bearer", "session"]
Key = tuple[Kind, str]


@dataclass(frozen=True, slots=True)
class _Known:
    resolved: CredentialResolved
    asked_at: float


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request.

    Args:
        by_cookie: the browser added the credential by itself, so the call may not be the user's intent.
        expires_soon_at: the near end of the API key's secret, None while it is far.
    """

    principal: Principal
    by_cookie: bool
    expires_soon_at: datetime | None = None


class Credentials:
    """Resolves the credentials of requests."""

    def __init__(self, internal: InternalClient) -> None:
        self._internal = internal
        self._known: dict[Key, _Known] = {}
        self._asking: dict[Key, asyncio.Task[_Known]] = {}
        self._tasks: set[asyncio.Task[_Known]] = set()

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self) -> None:
        """Ask anew about everybody: what auth was just told may have changed what anybody may do."""
        self._known.clear()
        self._asking.clear()

    def has_seen_valid(self, request: web.Request) -> bool:
        """A credential of the request was valid lately, whatever it is by now."""
        presented: tuple[Key, Key] = (
            ("bearer", _bearer_of(request.headers.get("Authorization", ""))),
            ("session", cookie_of(request, SESSION_COOKIE)),
        )
        known = (self._known.get(key) for key in presented)
        return any(item is not None and item.resolved.principal is not None for item in known)

    async def caller_of(self, request: web.Request) -> Caller:
        """Who sent the request.

        A bearer that has none of our formats (OLake's page sends the literal ``authenticated``) does not decide when
        a valid session cookie is there.

        Raises:
            Unauthenticated: no credential, or one that auth refuses.
            RetryLater: auth can't be asked.
        """
        authorization = request.headers.get("Authorization", "")
        bearer = _bearer_of(authorization)
        session = cookie_of(request, SESSION_COOKIE)
        if session and not bearer.startswith(OUR_PREFIX):
            resolved = await self._resolve("session", session)
            if resolved.principal is not None:
                return Caller(resolved.principal, by_cookie=True)
            if not bearer:
                raise _refusal(resolved)
        if not bearer:
            raise Unauthenticated(
                "authentication is required: send an API key, an OAuth or a session token in Authorization"
            )
        resolved = await self._resolve("bearer", bearer)
        if resolved.principal is None:
            raise _refusal(resolved)
        return Caller(resolved.principal, by_cookie=False, expires_soon_at=resolved.expires_soon_at)

    async def _resolve(self, kind: Kind, credential: str) -> CredentialResolved:
        key = (kind, credential)
        arrived_at = time.monotonic()
        known = self._known.get(key)
        if known is not None and (age_seconds := arrived_at - known.asked_at) < USED_SECONDS:
            if age_seconds >= REFRESHED_SECONDS:
                self._ask(key)
            return known.resolved
        if len(credential) > CREDENTIAL_LENGTH_MAX or not is_text(credential):
            return CredentialResolved(principal=None, reason="unknown")
        try:
            known = await asyncio.shield(self._ask(key))
            if known.asked_at < arrived_at and time.monotonic() - known.asked_at >= USED_SECONDS:
                # A slow answer to somebody who asked before us may be from before a revocation.
                known = await asyncio.shield(self._ask(key))
        except DataSyncError as error:
            raise RetryLater(
                "credentials can't be checked at the moment", code="auth_unavailable", retry_after_seconds=1
            ) from error
        return known.resolved

    def _ask(self, key: Key) -> asyncio.Task[_Known]:
        asking = self._asking.get(key)
        if asking is None:
            asking = asyncio.get_running_loop().create_task(self._fetch(key), name="resolve-credential")
            self._asking[key] = asking
            self._tasks.add(asking)
            asking.add_done_callback(lambda task: self._asked(key, task))
        return asking

    async def _fetch(self, key: Key) -> _Known:
        asked_at = time.monotonic()
        presented = CredentialPresented(kind=key[0], credential=key[1])
        known = _Known(await self._internal.call(RESOLVE_CREDENTIAL, presented), asked_at)
        if self._asking.get(key) is asyncio.current_task():
            if len(self._known) >= CACHED_MAX:
                self._drop_old(asked_at)
            self._known[key] = known
        return known

    def _asked(self, key: Key, task: asyncio.Task[_Known]) -> None:
        self._tasks.discard(task)
        if self._asking.get(key) is task:
            del self._asking[key]
        # Whoever waits gets the error; a refresh in the background has nobody, and the next request asks again.
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("credential_not_resolved", error=str(error))

    def _drop_old(self, now: float) -> None:
        """Drop what is too old to be used, and everything if that was not enough."""
        self._known = {key: known for key, known in self._known.items() if now - known.asked_at < USED_SECONDS}
        if len(self._known) >= CACHED_MAX:
            self._known.clear()


def _bearer_of(authorization: str) -> str:
    """``Bearer x`` and a bare ``x`` are both ``x`` (seed of the sync API allows a raw key)."""
    scheme, _, rest = authorization.strip().partition(" ")
    return rest.strip() if scheme.lower() == "bearer" else authorization.strip()


def _refusal(resolved: CredentialResolved) -> Unauthenticated:
    words = {"expired": "has expired", "revoked": "was revoked"}
    reason = words.get(resolved.reason or "", "is not valid")
    return Unauthenticated(f"the credential {reason}", code="invalid_credential")
