"""API keys: issuing, rotating, renaming and revoking them, with what is kept beside their events."""

from dataclasses import dataclass
from datetime import timedelta

from libs.contracts.auth import Plan
from libs.core.clock import Clock
from libs.core.decider import Act, ExpectedVersion
from libs.core.envelope import Metadata
from libs.core.ids import uuid7
from libs.core.principal import Principal
from libs.eventsourcing.command_handler import CommandHandler, Entity, IdempotencyKey, Work
from libs.eventsourcing.event_store import SideWrite
from libs.mongodb.client import Document
from services.auth.domain.api_key import (
    API_KEY,
    FIRST_SECRET,
    ApiKey,
    IssueApiKey,
    RenameApiKey,
    RevokeApiKey,
    RotateApiKey,
)
from services.auth.domain.scopes import Permission, granted_scopes
from services.auth.grants import refuse_more_than_own, require_control, require_right_to_plan
from services.auth.queries import SECRETS, AuthQueries, api_key_id
from services.auth.tokens import new_api_key, shown_prefix, token_hash


@dataclass(frozen=True, slots=True)
class KeyWanted:
    """``scopes`` None means all that the permission allows."""

    name: str
    permission: Permission
    scopes: tuple[str, ...] | None
    developer_id: str | None
    expires_in_days: int
    plan: Plan = "standard"


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
        scopes = granted_scopes(wanted.permission, wanted.scopes)
        command = IssueApiKey(
            name=wanted.name,
            prefix=shown_prefix(key),
            permission=wanted.permission,
            scopes=scopes,
            developer_id=wanted.developer_id,
            expires_at=self._clock.now() + timedelta(days=wanted.expires_in_days),
            plan=wanted.plan,
            member_id=await self._queries.member_behind(issuer),
        )
        refuse_more_than_own(issuer, scopes, command.developer_id)
        require_right_to_plan(issuer, command.plan)
        secret = _secret(key, key_id, FIRST_SECRET, project_id)
        return await self._shown_once(key, Work([Act(API_KEY, key_id, command)], metadata, [secret], idempotency))

    async def rotate(
        self,
        caller: Principal,
        key: Entity[ApiKey],
        project_id: int,
        overlap: timedelta,
        lifetime: timedelta | None,
        metadata: Metadata,
        expected_version: ExpectedVersion,
        idempotency: IdempotencyKey | None,
    ) -> IssuedKey:
        """Give a key another secret; the former one stays good for ``overlap``, but not beyond its own end.

        Raises:
            Forbidden: the key holds more than its caller does, or is another member's.
            Conflict: it was revoked.
        """
        await self._require_control(caller, key, metadata)
        refuse_more_than_own(caller, key.state.scopes, key.state.developer_id)
        secret_id, text = uuid7(), new_api_key()
        command = RotateApiKey(secret_id, shown_prefix(text), self._clock.now(), overlap, lifetime)
        secret = _secret(text, str(key.id), secret_id, project_id)
        act = Act(API_KEY, key.id, command, expected_version)
        return await self._shown_once(text, Work([act], metadata, [secret], idempotency))

    async def rename(
        self, caller: Principal, key: Entity[ApiKey], name: str, metadata: Metadata, expected_version: ExpectedVersion
    ) -> Entity[ApiKey]:
        await self._require_control(caller, key, metadata)
        return await self._commands.handle(
            API_KEY, key.id, RenameApiKey(name), metadata, expected_version=expected_version
        )

    async def revoke(
        self, caller: Principal, key: Entity[ApiKey], metadata: Metadata, expected_version: ExpectedVersion
    ) -> Entity[ApiKey]:
        """Revoke a key; all its secrets are refused from the moment that this returns."""
        await self._require_control(caller, key, metadata)
        return await self._commands.handle(API_KEY, key.id, RevokeApiKey(), metadata, expected_version=expected_version)

    async def _require_control(self, caller: Principal, key: Entity[ApiKey], metadata: Metadata) -> None:
        require_control(caller, metadata.project_id, key, await self._queries.member_behind(caller))

    async def _shown_once(self, secret: str, work: Work) -> IssuedKey:
        outcome = await self._commands.execute(work)
        entity = outcome.entities[0]
        assert entity is not None
        return IssuedKey(entity, None if outcome.replayed else secret)


def _secret(text: str, key_id: str, secret_id: str, project_id: int) -> SideWrite:
    """Which key a text opens, and as which of its secrets; whether it does is the key's to say."""
    identifier = api_key_id(token_hash(text))
    document: Document = {
        "_id": identifier,
        "kind": "api_key",
        "key_id": key_id,
        "secret_id": secret_id,
        "project_id": project_id,
    }
    return SideWrite(SECRETS, identifier, document)
