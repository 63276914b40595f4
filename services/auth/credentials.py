"""Resolves a credential to its owner, for the gateway.

Everything is decided by two look-ups: of the credential's hash, and of whom it belongs to. Nothing here waits for the
event log, so that what was revoked is refused from the moment that its revocation is stored.
"""

import asyncio
import hmac

from libs.contracts.internal import CredentialPresented, CredentialResolved
from libs.core.clock import Clock
from libs.core.principal import FIRST_PROJECT_ID, Principal
from libs.core.scopes import ALL_SCOPES
from services.auth.domain.api_key import WARNED_BEFORE
from services.auth.oauth import OauthTokens
from services.auth.queries import AuthQueries
from services.auth.sessions import Sessions
from services.auth.tokens import is_access_token, is_api_key, is_session_token, token_hash
from services.auth.usage import Usage

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
        self,
        queries: AuthQueries,
        sessions: Sessions,
        tokens: OauthTokens,
        usage: Usage,
        clock: Clock,
        bootstrap_key: str | None,
    ) -> None:
        self._queries = queries
        self._sessions = sessions
        self._tokens = tokens
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
        if presented.kind == "bearer" and is_access_token(credential):
            return await self._resolve_token(credential)
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

    async def _resolve_key(self, text: str) -> CredentialResolved:
        found = await self._queries.key_of(token_hash(text))
        if found is None:
            return UNKNOWN
        key, project_id, secret_id = found
        state, now = key.state, self._clock.now()
        match state.refusal_of(secret_id, now):
            case "revoked":
                return REVOKED
            case "expired":
                return EXPIRED
        if not await self._queries.is_member(state.member_id, project_id):
            return REVOKED
        self._usage.note_key(str(key.id))
        principal = Principal(
            kind="api_key",
            subject=str(key.id),
            name=state.name,
            projects={project_id: "member"},
            scopes=state.scopes,
            developer_id=state.developer_id,
            rate_class=state.plan,
        )
        end = state.end_of(secret_id)
        expires_soon_at = end if end is not None and end <= now + WARNED_BEFORE else None
        return CredentialResolved(principal=principal, expires_soon_at=expires_soon_at)

    async def _resolve_token(self, text: str) -> CredentialResolved:
        token = await self._tokens.find(text)
        if token is None:
            return EXPIRED
        client = await self._queries.client(token.client_id)
        if client is None or client.state.revoked_at is not None:
            return REVOKED
        if not await self._queries.is_member(client.state.member_id, token.project_id):
            return REVOKED
        self._usage.note_key(token.client_id)
        principal = Principal(
            kind="oauth_client",
            subject=token.client_id,
            name=client.state.name,
            projects={token.project_id: "member"},
            scopes=token.scopes,
            developer_id=client.state.developer_id,
            rate_class=client.state.plan,
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
