"""API keys: issuing and revoking them, with what is kept beside their events."""

from dataclasses import dataclass
from datetime import timedelta

from libs.core.clock import Clock
from libs.core.decider import Act
from libs.core.envelope import Metadata
from libs.core.errors import FieldError, Forbidden, NotFound
from libs.core.ids import uuid7
from libs.core.principal import Principal
from libs.runtime.command_handler import CommandHandler, Entity, IdempotencyKey, Work
from libs.runtime.event_store import SideWrite
from libs.runtime.mongo import Document
from services.auth.domain.api_key import (
    ALL_SCOPES,
    API_KEY,
    ApiKey,
    IssueApiKey,
    Permission,
    RevokeApiKey,
    granted_scopes,
)
from services.auth.queries import SECRETS, AuthQueries, api_key_id
from services.auth.tokens import new_api_key, shown_prefix, token_hash


@dataclass(frozen=True, slots=True)
class KeyWanted:
    name: str
    permission: Permission
    scopes: tuple[str, ...]
    developer_id: str | None
    expires_in_days: int


@dataclass(frozen=True, slots=True)
class IssuedKey:
    """``secret`` is the key itself, None when a repeated request was answered again: it is shown once."""

    entity: Entity[ApiKey]
    secret: str | None


class Keys:
    """The use cases of API keys."""

    def __init__(self, commands: CommandHandler, queries: AuthQueries, clock: Clock) -> None:
        self._commands = commands
        self._queries = queries
        self._clock = clock

    async def issue(
        self,
        issuer: Principal,
        project_id: int,
        wanted: KeyWanted,
        metadata: Metadata,
        idempotency: IdempotencyKey | None,
    ) -> IssuedKey:
        """Issue a key for the project.

        Raises:
            InvalidInput: a scope that is unknown or that the permission excludes.
            Forbidden: the key would hold more than its issuer does.
        """
        key_id, key = uuid7(), new_api_key()
        command = IssueApiKey(
            name=wanted.name,
            prefix=shown_prefix(key),
            permission=wanted.permission,
            scopes=granted_scopes(wanted.permission, wanted.scopes),
            developer_id=wanted.developer_id,
            expires_at=self._clock.now() + timedelta(days=wanted.expires_in_days),
        )
        _refuse_more_than_own(issuer, command)
        secret = _secret(key_id, token_hash(key), project_id, command)
        work = Work([Act(API_KEY, key_id, command)], metadata, [secret], idempotency)
        outcome = await self._commands.execute(work)
        entity = outcome.entities[0]
        assert entity is not None
        return IssuedKey(entity, None if outcome.replayed else key)

    async def revoke(self, key_id: str, metadata: Metadata, expected_version: int | None) -> Entity[ApiKey]:
        """Revoke a key of the project in ``metadata``; it is refused from the moment that this returns."""
        secret = await self._queries.secret_of_key(key_id)
        if secret is None:
            raise NotFound("there is no such key", code="key_not_found")
        revoked: Document = {**secret, "revoked_at": secret["revoked_at"] or self._clock.now()}
        return await self._commands.handle(
            API_KEY,
            key_id,
            RevokeApiKey(),
            metadata,
            expected_version=expected_version,
            side_writes=[SideWrite(SECRETS, secret["_id"], revoked)],
        )


def _secret(key_id: str, key_hash: str, project_id: int, command: IssueApiKey) -> SideWrite:
    """Everything that presenting the key has to tell, so that one look-up is enough."""
    identifier = api_key_id(key_hash)
    document: Document = {
        "_id": identifier,
        "kind": "api_key",
        "key_id": key_id,
        "project_id": project_id,
        "name": command.name,
        "permission": command.permission,
        "scopes": list(command.scopes),
        "developer_id": command.developer_id,
        "expires_at": command.expires_at,
        "revoked_at": None,
    }
    return SideWrite(SECRETS, identifier, document)


def _refuse_more_than_own(issuer: Principal, command: IssueApiKey) -> None:
    if issuer.developer_id is not None and command.developer_id != issuer.developer_id:
        message = "a key that is bound to a developer can issue keys for that developer only"
        raise Forbidden(message, code="insufficient_scope", errors=[FieldError("developer_id", message)])
    if ALL_SCOPES in issuer.scopes:
        return
    lacking = [scope for scope in command.scopes if scope not in issuer.scopes]
    if lacking:
        message = f"your credential does not hold {', '.join(lacking)} and so can't grant it"
        raise Forbidden(message, code="insufficient_scope", errors=[FieldError("scopes", message)])
