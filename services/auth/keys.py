"""API keys: issuing, rotating, renaming and revoking them, with their secrets' hashes beside their events."""

from datetime import timedelta

from libs.core.clock import Clock
from libs.core.decider import Act
from libs.core.entity import Entity
from libs.core.ids import uuid7
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.mongodb.client import Document
from libs.web.calls import Call
from libs.web.entities import TEXTS, Entities, in_any_project
from services.auth.domain.api_key import (
    API_KEY,
    FIRST_SECRET,
    ApiKey,
    IssueApiKey,
    RenameApiKey,
    RevokeApiKey,
    RotateApiKey,
)
from services.auth.domain.scopes import granted_scopes
from services.auth.grants import (
    Issued,
    issue_once,
    refuse_more_than_own,
    require_control,
    require_right_to_plan,
)
from services.auth.inputs import NewKeyBody, RotationBody
from services.auth.queries import SECRETS, AuthQueries, api_key_id
from services.auth.tokens import new_api_key, shown_prefix, token_hash


class Keys(Entities[ApiKey]):
    """The API keys of the caller's projects."""

    def __init__(self, documents: Documents, commands: CommandHandler, queries: AuthQueries, clock: Clock) -> None:
        super().__init__(
            API_KEY,
            documents,
            commands,
            parameter="keyid",
            ids=TEXTS,
            permit=in_any_project,
            not_found_code="key_not_found",
        )
        self._queries = queries
        self._clock = clock

    async def issue(self, call: Call, wanted: NewKeyBody) -> Issued[ApiKey]:
        """Issue a key for the call's project.

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
            member_id=await self._queries.member_behind(call.caller),
        )
        refuse_more_than_own(call.caller, scopes, command.developer_id)
        require_right_to_plan(call.caller, command.plan)
        secret = _secret(key, key_id, FIRST_SECRET, call.project_id)
        return await issue_once(self.commands, call, Act(API_KEY, key_id, command), key, secret)

    async def rotate(self, call: Call, wanted: RotationBody) -> Issued[ApiKey]:
        """Give the key that the path names another secret; the former one stays good for the overlap, but not beyond
        its own end.

        Raises:
            Forbidden: the key holds more than its caller does, or is another member's.
            Conflict: it was revoked.
        """
        key = await self._controlled(call)
        call = call.in_project(key.project_id)
        refuse_more_than_own(call.caller, key.state.scopes, key.state.developer_id)
        secret_id, text = uuid7(), new_api_key()
        overlap = timedelta(seconds=wanted.overlap_seconds)
        lifetime = None if wanted.expires_in_days is None else timedelta(days=wanted.expires_in_days)
        command = RotateApiKey(secret_id, shown_prefix(text), self._clock.now(), overlap, lifetime)
        secret = _secret(text, str(key.id), secret_id, call.project_id)
        return await issue_once(self.commands, call, Act(API_KEY, key.id, command, call.expected_version), text, secret)

    async def rename(self, call: Call, name: str) -> Entity[ApiKey]:
        """Rename the key that the path names."""
        return await self._change(call, RenameApiKey(name))

    async def revoke(self, call: Call) -> Entity[ApiKey]:
        """Revoke the key that the path names; all its secrets are refused from the moment that this returns."""
        return await self._change(call, RevokeApiKey())

    async def _change(self, call: Call, command: RenameApiKey | RevokeApiKey) -> Entity[ApiKey]:
        key = await self._controlled(call)
        return await self.handle(call.in_project(key.project_id), key.id, command)

    async def _controlled(self, call: Call) -> Entity[ApiKey]:
        """The key that the path names; raises ``Forbidden`` unless the caller may change it."""
        key = await self.require(call)
        require_control(call.caller, key, await self._queries.member_behind(call.caller))
        return key


def _secret(text: str, key_id: str, secret_id: str, project_id: int) -> SideWrite:
    """The document that maps a secret's hash to its key; the key's state decides whether the secret is valid."""
    identifier = api_key_id(token_hash(text))
    document: Document = {
        "_id": identifier,
        "kind": "api_key",
        "key_id": key_id,
        "secret_id": secret_id,
        "project_id": project_id,
    }
    return SideWrite(SECRETS, identifier, document)
