"""Reads of users, projects, keys and their secrets."""

import asyncio
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any, TypeVar

from libs.core.decider import Aggregate
from libs.core.entity import Entity
from libs.core.envelope import Frozen
from libs.core.principal import Principal, Role
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.entities import entity_of
from libs.mongodb.client import ASCENDING, Document, IndexModel
from libs.process.coalescer import Coalescer
from services.auth.domain.api_key import API_KEY, ApiKey
from services.auth.domain.oauth_client import OAUTH_CLIENT, OauthClient
from services.auth.domain.project import PROJECT, Project
from services.auth.domain.user import USER, User, email_key, username_key

SECRETS = "secrets"
SESSIONS = "sessions"
LOGIN_FAILURES = "login_failures"
KNOWN_ADDRESSES = "known_addresses"
KEY_USAGE = "key_usage"
OAUTH_TOKENS = "oauth_tokens"

USERS_MAX = 1_000
MEMBERS_TOGETHER_MAX = 500

State = TypeVar("State", bound=Frozen)

INDEXES = {
    PROJECT.collection: [IndexModel([("state.members.user_id", ASCENDING)])],
    API_KEY.collection: [
        IndexModel([("project_id", ASCENDING), ("_id", ASCENDING)]),
        IndexModel([("state.expires_at", ASCENDING)]),
    ],
    OAUTH_CLIENT.collection: [IndexModel([("project_id", ASCENDING), ("_id", ASCENDING)])],
    OAUTH_TOKENS: [IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)],
    SESSIONS: [IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)],
    LOGIN_FAILURES: [IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)],
    KNOWN_ADDRESSES: [IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)],
    KEY_USAGE: [IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0)],
}


def password_id(user_id: int) -> str:
    return f"password/{user_id}"


def api_key_id(key_hash: str) -> str:
    return f"api_key/{key_hash}"


def client_secret_id(client_id: str) -> str:
    return f"oauth_client/{client_id}"


class AuthQueries:
    """Reads of the auth service's database.

    Args:
        documents: the service's reads; look-ups by id that arrive together share a query.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._memberships = Coalescer(self._roles_of, MEMBERS_TOGETHER_MAX)

    async def user(self, user_id: int) -> Entity[User] | None:
        return await self._documents.get(USER, user_id)

    async def user_by_login(self, login: str) -> Entity[User] | None:
        """By username or e-mail address, whatever the case."""
        users = self._documents.collection(USER.collection)
        found = await users.find_one({"keys": {"$in": [username_key(login), email_key(login)]}})
        return None if found is None else entity_of(USER, found)

    async def taken_fields(self, username: str | None, email: str | None, but_of: int | None = None) -> list[str]:
        """Which of ``username`` and ``email`` another user has."""
        keys = {}
        if username is not None:
            keys[username_key(username)] = "username"
        if email is not None:
            keys[email_key(email)] = "email"
        users = self._documents.collection(USER.collection)
        found = users.find({"keys": {"$in": list(keys)}, "_id": {"$ne": but_of}}, {"keys": True})
        held = {key async for document in found for key in document["keys"]}
        return [field for key, field in keys.items() if key in held]

    async def users(self, user_ids: Iterable[int]) -> list[Entity[User]]:
        """Newest first."""
        return await self._documents.find(USER, {"_id": {"$in": list(set(user_ids))}}, limit=USERS_MAX)

    async def password_hash(self, user_id: int) -> str | None:
        secret = await self._documents.document(SECRETS, password_id(user_id))
        return None if secret is None else str(secret["hash"])

    async def project(self, project_id: int) -> Entity[Project] | None:
        return await self._documents.get(PROJECT, project_id)

    async def projects(self, project_ids: Iterable[int]) -> list[Entity[Project]]:
        found = await asyncio.gather(*(self.project(project_id) for project_id in project_ids))
        return [entity for entity in found if entity is not None]

    async def projects_of(self, user_id: int) -> dict[int, Role]:
        """The role that the user holds in each project."""
        return await self._memberships.get(user_id) or {}

    async def page(
        self, aggregate: Aggregate[State], project_ids: Iterable[int], limit: int, offset: int
    ) -> list[Entity[State]]:
        """Keys or clients of the projects, newest first; revoked and expired ones too."""
        criteria = {"project_id": {"$in": list(project_ids)}}
        return await self._documents.find(aggregate, criteria, limit=limit, skip=offset)

    async def expiring_keys(self, after: datetime, until: datetime, limit: int) -> list[tuple[str, int]]:
        """Ids and projects of valid keys that expire in this period and whose expiry has not been announced."""
        criteria = {
            "state.expires_at": {"$gt": after, "$lte": until},
            "state.revoked_at": None,
            "state.expiry_announced_at": None,
        }
        keys = self._documents.collection(API_KEY.collection)
        found = keys.find(criteria, {"project_id": True}).sort("state.expires_at", ASCENDING).limit(limit)
        return [(document["_id"], document["project_id"]) async for document in found]

    async def key_of(self, key_hash: str) -> tuple[Entity[ApiKey], int, str] | None:
        """The key of a presented secret: the key, its project, and the id of the secret."""
        secret = await self._documents.document(SECRETS, api_key_id(key_hash))
        key = None if secret is None else await self._documents.get(API_KEY, secret["key_id"])
        if secret is None or key is None:
            return None
        return key, secret["project_id"], secret["secret_id"]

    async def member_behind(self, caller: Principal) -> int | None:
        """The user on whose behalf a caller acts, None for the environment's key."""
        match caller.kind:
            case "user":
                return int(caller.subject)
            case "api_key":
                key = await self._documents.get(API_KEY, caller.subject)
                return None if key is None else key.state.member_id
            case "oauth_client":
                client = await self.client(caller.subject)
                return None if client is None else client.state.member_id
            case "service":
                return None

    async def is_member(self, member_id: int | None, project_id: int) -> bool:
        """Whether a credential's member still is one; a credential without a member is independent of memberships."""
        return member_id is None or project_id in await self.projects_of(member_id)

    async def good_credentials_of(
        self, aggregate: Aggregate[Any], project_id: int, member_id: int, limit: int
    ) -> list[str]:
        """Ids of a member's keys or clients of the project that were not revoked."""
        criteria = {"project_id": project_id, "state.member_id": member_id, "state.revoked_at": None}
        found = self._documents.collection(aggregate.collection).find(criteria, {"_id": True}).limit(limit)
        return [document["_id"] async for document in found]

    async def client(self, client_id: str) -> Entity[OauthClient] | None:
        return await self._documents.get(OAUTH_CLIENT, client_id)

    async def usage_of(self, key_ids: Iterable[int | str]) -> dict[str, Document]:
        """When the keys were last used, as recorded so far."""
        found = self._documents.plain(KEY_USAGE).find({"_id": {"$in": list(key_ids)}})
        return {document["_id"]: document async for document in found}

    async def _roles_of(self, user_ids: Collection[int]) -> Mapping[int, dict[int, Role]]:
        """The projects of several users, with their role in each."""
        roles: dict[int, dict[int, Role]] = {user_id: {} for user_id in user_ids}
        found = self._documents.collection(PROJECT.collection).find(
            {"state.members.user_id": {"$in": list(user_ids)}}, {"state.members": True}
        )
        for document in await found.to_list(None):
            for member in document["state"]["members"]:
                if member["user_id"] in roles:
                    roles[member["user_id"]][document["_id"]] = member["role"]
        return roles
