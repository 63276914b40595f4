"""OAuth 2.0 client credentials: clients, and the tokens that they get for their secret (RFC 6749 section 4.4).

Tokens are opaque texts of one hour, kept as SHA-256 in a collection with a TTL. A token opens nothing once its client
was revoked, for whoever presents it is decided with the client's state.
"""

import base64
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from urllib.parse import unquote_plus

from libs.core.clock import Clock
from libs.core.decider import Act
from libs.core.entity import Entity
from libs.core.errors import FixRequest, InvalidInput, Unauthenticated
from libs.core.ids import uuid7
from libs.core.scopes import ALL_SCOPES, SCOPES
from libs.eventsourcing.batch import SideWrite
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.documents import Documents
from libs.eventsourcing.entities import state_of
from libs.web.calls import Call
from libs.web.entities import TEXTS, Entities, in_any_project
from services.auth.domain.oauth_client import OAUTH_CLIENT, IssueOauthClient, OauthClient, RevokeOauthClient
from services.auth.domain.scopes import granted_scopes
from services.auth.grants import Issued, issue_once, refuse_more_than_own, require_control, require_right_to_plan
from services.auth.inputs import NewClientBody
from services.auth.queries import OAUTH_TOKENS, SECRETS, AuthQueries, client_secret_id
from services.auth.throttle import LoginThrottle
from services.auth.tokens import new_access_token, new_client_secret, token_hash

TOKEN_SECONDS = 3600
GRANT_TYPE = "client_credentials"
_NO_HASH = token_hash("")


@dataclass(frozen=True, slots=True)
class ClientCredentials:
    client_id: str
    secret: str


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """Who asks for a token, and for which scopes; None for all that the client holds."""

    client: ClientCredentials
    scopes: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class AccessToken:
    """A new token; its text is not stored."""

    text: str
    scopes: tuple[str, ...]
    expires_in_seconds: int = TOKEN_SECONDS


@dataclass(frozen=True, slots=True)
class KnownToken:
    """A token that has not expired."""

    client_id: str
    project_id: int
    scopes: tuple[str, ...]
    expires_at: datetime


class OauthClients(Entities[OauthClient]):
    """The OAuth clients of the caller's projects."""

    def __init__(self, documents: Documents, commands: CommandHandler, queries: AuthQueries) -> None:
        super().__init__(
            OAUTH_CLIENT,
            documents,
            commands,
            parameter="clientid",
            ids=TEXTS,
            permit=in_any_project,
            not_found_code="client_not_found",
        )
        self._queries = queries

    async def issue(self, call: Call, wanted: NewClientBody) -> Issued[OauthClient]:
        """Issue a client for the call's project.

        Raises:
            InvalidInput: an unknown scope.
            Forbidden: its tokens would hold more than its issuer does.
        """
        client_id, secret = uuid7(), new_client_secret()
        scopes = granted_scopes("read-write", wanted.scopes)
        refuse_more_than_own(call.caller, scopes, wanted.developer_id)
        require_right_to_plan(call.caller, wanted.plan)
        member_id = await self._queries.member_behind(call.caller)
        command = IssueOauthClient(wanted.name, scopes, wanted.developer_id, wanted.plan, member_id)
        identifier = client_secret_id(client_id)
        kept = {"_id": identifier, "kind": "oauth_client", "client_id": client_id, "hash": token_hash(secret)}
        act = Act(OAUTH_CLIENT, client_id, command)
        return await issue_once(self.commands, call, act, secret, SideWrite(SECRETS, identifier, kept))

    async def revoke(self, call: Call) -> Entity[OauthClient]:
        """Revoke the client that the path names; its tokens are refused from the moment that this returns."""
        client = await self.require(call)
        require_control(call.caller, client, await self._queries.member_behind(call.caller))
        return await self.handle(call.in_project(client.project_id), client.id, RevokeOauthClient())


class OauthTokens:
    """Grants and finds access tokens.

    A wrong secret counts against its client and its address, and after some of them is answered 429; the right one is
    never refused for others' failures, so that nobody can lock a client out by its id, which is no secret.
    """

    def __init__(
        self,
        documents: Documents,
        queries: AuthQueries,
        clock: Clock,
        throttle_clients: LoginThrottle,
        throttle_addresses: LoginThrottle,
    ) -> None:
        self._documents = documents
        self._queries = queries
        self._clock = clock
        self._throttle_clients = throttle_clients
        self._throttle_addresses = throttle_addresses

    async def grant(self, request: TokenRequest, address: str) -> AccessToken:
        """A token of one hour for a client's secret.

        Raises:
            Unauthenticated: ``invalid_client``: the client or its secret is wrong, or it was revoked.
            InvalidInput: ``invalid_scope``: more than the client holds, or no scope at all.
            RateLimited: too many wrong secrets.
        """
        client_id = request.client.client_id
        client = await self._authenticated(request.client)
        if client is None:
            await self._throttle_addresses.admit(address)
            await self._throttle_clients.admit(client_id)
            raise Unauthenticated("the client or its secret is wrong", code="invalid_client")
        state, project_id = client
        scopes = _narrowed(state.scopes, request.scopes)
        text, now = new_access_token(), self._clock.now()
        await self._documents.plain(OAUTH_TOKENS).insert_one(
            {
                "_id": token_hash(text),
                "client_id": client_id,
                "project_id": project_id,
                "scopes": list(scopes),
                "issued_at": now,
                "expires_at": now + timedelta(seconds=TOKEN_SECONDS),
            }
        )
        return AccessToken(text, scopes)

    async def find(self, text: str) -> KnownToken | None:
        """What a token was granted, None when it is unknown or has expired."""
        found = await self._documents.document(OAUTH_TOKENS, token_hash(text))
        if found is None or found["expires_at"] <= self._clock.now():
            return None
        return KnownToken(found["client_id"], found["project_id"], tuple(found["scopes"]), found["expires_at"])

    async def _authenticated(self, presented: ClientCredentials) -> tuple[OauthClient, int] | None:
        secret = await self._documents.document(SECRETS, client_secret_id(presented.client_id))
        expected = _NO_HASH if secret is None else str(secret["hash"])
        if not hmac.compare_digest(token_hash(presented.secret), expected) or secret is None:
            return None
        document = await self._documents.document(OAUTH_CLIENT.collection, presented.client_id)
        if document is None:
            return None
        state = state_of(OAUTH_CLIENT, document)
        project_id: int = document["project_id"]
        if state.revoked_at is not None or not await self._queries.is_member(state.member_id, project_id):
            return None
        return state, project_id


def token_request(authorization: str | None, form: Mapping[str, str]) -> TokenRequest:
    """What a request to the token endpoint asks for.

    Args:
        authorization: the header, if there is one.
        form: the body's parameters, without those that have no value.

    Raises:
        FixRequest: ``invalid_request`` or ``unsupported_grant_type`` (RFC 6749 section 5.2).
        Unauthenticated: ``invalid_client``: no or malformed client authentication.
    """
    grant_type = form.get("grant_type")
    if grant_type is None:
        raise FixRequest("grant_type is required", code="invalid_request")
    if grant_type != GRANT_TYPE:
        raise FixRequest(f"the only grant_type here is {GRANT_TYPE}", code="unsupported_grant_type")
    client = _client_of(authorization, form)
    scope = form.get("scope")
    return TokenRequest(client, None if scope is None else tuple(dict.fromkeys(scope.split(" "))))


def _client_of(authorization: str | None, form: Mapping[str, str]) -> ClientCredentials:
    """By HTTP Basic or in the body, never both (RFC 6749 section 2.3)."""
    if authorization is None:
        if "client_id" not in form or "client_secret" not in form:
            message = "authenticate the client by HTTP Basic, or by client_id and client_secret in the body"
            raise Unauthenticated(message, code="invalid_client")
        return ClientCredentials(form["client_id"], form["client_secret"])
    client = _basic(authorization)
    if "client_secret" in form:
        raise FixRequest("authenticate the client in one way only: client_secret comes twice", code="invalid_request")
    if form.get("client_id", client.client_id) != client.client_id:
        raise FixRequest("client_id is not the one of the Authorization header", code="invalid_request")
    return client


def _basic(authorization: str) -> ClientCredentials:
    """RFC 7617, with id and secret form-urlencoded inside (RFC 6749 section 2.3.1)."""
    malformed = Unauthenticated("the Authorization header is not HTTP Basic of a client", code="invalid_client")
    scheme, _, encoded = authorization.strip().partition(" ")
    if scheme.lower() != "basic":
        raise malformed
    try:
        decoded = base64.b64decode(encoded.strip(), validate=True).decode()
    except ValueError:
        raise malformed from None
    client_id, separator, secret = decoded.partition(":")
    if not separator:
        raise malformed
    return ClientCredentials(unquote_plus(client_id), unquote_plus(secret))


def _narrowed(held: tuple[str, ...], wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    if wanted is None:
        return held
    for scope in wanted:
        if scope not in (ALL_SCOPES, *SCOPES):
            raise InvalidInput(f"{scope[:64]!r} is not a scope", code="invalid_scope")
        if scope not in held and ALL_SCOPES not in held:
            raise InvalidInput(f"the client does not hold the scope {scope}", code="invalid_scope")
    return wanted
