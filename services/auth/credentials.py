"""Whom a credential belongs to: the answer that the gateway asks for.

A key is decided by one look-up of its hash, a session by two; nothing here waits for the event log, so that what was
revoked is refused from the moment that its revocation is stored.
"""

import asyncio
import hmac

from libs.contracts.internal import CredentialPresented, CredentialResolved
from libs.core.clock import Clock
from libs.core.principal import Principal
from services.auth.domain.api_key import ALL_SCOPES
from services.auth.queries import AuthQueries
from services.auth.sessions import Sessions
from services.auth.tokens import is_api_key, is_session_token, token_hash
from services.auth.usage import Usage

FIRST_PROJECT_ID = 123
BOOTSTRAP_KEY_NAME = "bootstrap-key"

UNKNOWN = CredentialResolved(principal=None, reason="unknown")
EXPIRED = CredentialResolved(principal=None, reason="expired")
REVOKED = CredentialResolved(principal=None, reason="revoked")


class Credentials:
    """Resolves credentials to principals.

    Args:
        bootstrap_key: the key of the environment, None without one; only its hash is held.
    """

    def __init__(
        self, queries: AuthQueries, sessions: Sessions, usage: Usage, clock: Clock, bootstrap_key: str | None
    ) -> None:
        self._queries = queries
        self._sessions = sessions
        self._usage = usage
        self._clock = clock
        self._bootstrap_hash = None if bootstrap_key is None else token_hash(bootstrap_key)

    async def resolve(self, presented: CredentialPresented) -> CredentialResolved:
        """The principal of a credential, or why there is none."""
        credential = without_scheme(presented.credential) if presented.kind == "bearer" else presented.credential
        if presented.kind == "bearer" and self._is_bootstrap_key(credential):
            return CredentialResolved(principal=bootstrap_principal())
        if is_session_token(credential):
            return await self._resolve_session(credential)
        if presented.kind == "bearer" and is_api_key(credential):
            return await self._resolve_key(credential)
        return UNKNOWN

    def _is_bootstrap_key(self, credential: str) -> bool:
        return self._bootstrap_hash is not None and hmac.compare_digest(token_hash(credential), self._bootstrap_hash)

    async def _resolve_session(self, token: str) -> CredentialResolved:
        session = await self._sessions.find(token)
        if session is None:
            return EXPIRED
        user, projects = await asyncio.gather(
            self._queries.user(session.user_id), self._queries.projects_of(session.user_id)
        )
        if user is None or user.state.password_version != session.password_version:
            return REVOKED
        if self._sessions.is_to_renew(session):
            self._usage.note_session(session.id)
        principal = Principal(
            kind="user",
            subject=str(session.user_id),
            name=user.state.username,
            projects=projects,
            scopes=(ALL_SCOPES,),
        )
        return CredentialResolved(principal=principal)

    async def _resolve_key(self, key: str) -> CredentialResolved:
        secret = await self._queries.key_secret(token_hash(key))
        if secret is None:
            return UNKNOWN
        if secret["revoked_at"] is not None:
            return REVOKED
        if secret["expires_at"] is not None and secret["expires_at"] <= self._clock.now():
            return EXPIRED
        self._usage.note_key(secret["key_id"])
        principal = Principal(
            kind="api_key",
            subject=secret["key_id"],
            name=secret["name"],
            projects={secret["project_id"]: "member"},
            scopes=tuple(secret["scopes"]),
            developer_id=secret["developer_id"],
        )
        return CredentialResolved(principal=principal)


def without_scheme(authorization: str) -> str:
    """``Bearer x`` and ``x`` are both ``x`` (RFC 9110 section 11.1: the scheme's case does not matter)."""
    scheme, separator, rest = authorization.strip().partition(" ")
    return rest.strip() if separator and scheme.lower() == "bearer" else authorization.strip()


def bootstrap_principal() -> Principal:
    """The holder of the environment's key: owner of the first project, even before it exists."""
    return Principal(
        kind="api_key",
        subject="bootstrap",
        name=BOOTSTRAP_KEY_NAME,
        projects={FIRST_PROJECT_ID: "owner"},
        scopes=(ALL_SCOPES,),
    )
