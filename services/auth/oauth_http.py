"""The REST calls of OAuth: the clients of a project, and the token endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import parse_qsl

from aiohttp import web

from libs.core.errors import FixRequest, NotFound, UnsupportedMediaType
from libs.eventsourcing.command_handler import Entity
from libs.web.answers import json_answer
from libs.web.body import read_bytes
from libs.web.conditions import if_match_of
from libs.web.openapi import describe
from libs.web.requests import idempotency_of, metadata_of, principal_of, read_body, read_query
from services.auth.accounts import project_meant
from services.auth.answers import ClientIssued, ClientShown, ClientsShown, EventsShown, TokenGranted
from services.auth.domain.oauth_client import OAUTH_CLIENT, OauthClient
from services.auth.http import client_address, credentials_page, in_project
from services.auth.inputs import HistoryQuery, KeysQuery, NewClientBody, OneQuery, TokenForm
from services.auth.oauth import ClientWanted, OauthClients, OauthTokens, token_request
from services.auth.queries import AuthQueries
from services.auth.views import client_view, event_view, issued_client_view

FORM = "application/x-www-form-urlencoded"
FIELDS_MAX = 50
TAG = "OAuth"


@dataclass(frozen=True, slots=True)
class OauthRoutes:
    """Clients in the shapes of the v2 family, tokens as RFC 6749 says."""

    clients: OauthClients
    tokens: OauthTokens
    queries: AuthQueries

    def routes(self) -> Sequence[web.RouteDef]:
        token = describe(
            web.post("/oauth/token", self.token),
            "Exchange client credentials for an access token",
            tag=TAG,
            body=TokenForm,
            body_type=FORM,
            answer=TokenGranted,
            refuses=(401, 429),
            enveloped=False,
        )
        return [
            token,
            *(route for root in ("/api/v2", "/v2") for route in self._client_routes(f"{root}/oauth/clients")),
        ]

    def _client_routes(self, all_clients: str) -> Sequence[web.RouteDef]:
        one = f"{all_clients}/{{clientid}}"
        described = partial(describe, tag=TAG)
        return [
            described(
                web.post(all_clients, self.issue),
                "Issue an OAuth client",
                body=NewClientBody,
                answer=ClientIssued,
                status=201,
                idempotent=True,
                versioned=True,
            ),
            described(web.get(all_clients, self.list), "List the OAuth clients", query=KeysQuery, answer=ClientsShown),
            described(
                web.get(one, self.get), "Fetch an OAuth client", query=OneQuery, answer=ClientShown, versioned=True
            ),
            described(web.delete(one, self.revoke), "Revoke an OAuth client", answer=ClientShown, conditional=True),
            described(
                web.get(f"{one}/history", self.history),
                "The history of an OAuth client",
                query=HistoryQuery,
                answer=EventsShown,
            ),
        ]

    async def token(self, request: web.Request) -> web.StreamResponse:
        """RFC 6749 section 4.4: the client authenticates by HTTP Basic or in the body; ``scope`` narrows the token."""
        form = await read_form(request)
        asked = token_request(request.headers.get("Authorization"), form)
        token = await self.tokens.grant(asked, client_address(request))
        answer = json_answer(
            {
                "access_token": token.text,
                "token_type": "Bearer",
                "expires_in": token.expires_in_seconds,
                "scope": " ".join(token.scopes),
            }
        )
        answer.headers["Cache-Control"] = "no-store"
        answer.headers["Pragma"] = "no-cache"
        return answer

    async def issue(self, request: web.Request) -> web.StreamResponse:
        principal = principal_of(request)
        body = await read_body(request, NewClientBody)
        project_id = project_meant(principal, body.project_id)
        scopes = None if body.scopes is None else tuple(body.scopes)
        wanted = ClientWanted(body.name, scopes, body.developer_id, body.plan)
        metadata = in_project(metadata_of(request), project_id)
        issued = await self.clients.issue(principal, wanted, metadata, idempotency_of(request))
        answer = json_answer(issued_client_view(issued, project_id), status=201, etag=issued.entity.version)
        answer.headers["Cache-Control"] = "no-store"
        return answer

    async def list(self, request: web.Request) -> web.StreamResponse:
        return await credentials_page(request, self.queries, OAUTH_CLIENT, "clients", client_view)

    async def get(self, request: web.Request) -> web.StreamResponse:
        client, project_id = await self._own(request)
        usage = await self.queries.usage_of([client.id])
        moment = read_query(request, OneQuery).as_of
        if moment is None:
            shown = client_view(client, project_id, usage.get(str(client.id)))
            # The counters of use change without a new version.
            return json_answer(shown, etag=client.version, embeds_others=True)
        then = await self.queries.as_of(OAUTH_CLIENT, client.id, moment)
        return json_answer(client_view(then, project_id, None))

    async def history(self, request: web.Request) -> web.StreamResponse:
        client, _ = await self._own(request)
        query = read_query(request, HistoryQuery)
        events = await self.queries.history(OAUTH_CLIENT, client.id, query.before, query.limit)
        return json_answer({"events": [event_view(event) for event in events]})

    async def revoke(self, request: web.Request) -> web.StreamResponse:
        client, project_id = await self._own(request)
        metadata = in_project(metadata_of(request), project_id)
        revoked = await self.clients.revoke(principal_of(request), client, metadata, if_match_of(request))
        return json_answer(client_view(revoked, project_id, None), etag=revoked.version)

    async def _own(self, request: web.Request) -> tuple[Entity[OauthClient], int]:
        """The client of the path, with its project, which must be one of the caller's."""
        found = await self.queries.one_in(OAUTH_CLIENT, request.match_info["clientid"], principal_of(request))
        if found is None:
            raise NotFound("there is no such client in your projects", code="client_not_found")
        return found


async def read_form(request: web.Request) -> dict[str, str]:
    """The parameters of a form; those without a value count as left out (RFC 6749 section 3.2).

    Raises:
        UnsupportedMediaType: the body is no form.
        FixRequest: a parameter stands twice, or in the URL, where logs would keep it.
    """
    if request.query:
        raise FixRequest("parameters belong in the body, never in the URL", code="invalid_request")
    if request.content_type != FORM:
        raise UnsupportedMediaType(f"the content type must be {FORM}", code="invalid_request")
    body = await read_bytes(request)
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=FIELDS_MAX, errors="strict")
    except ValueError:
        raise FixRequest("the body is not a form in UTF-8", code="invalid_request") from None
    form = dict(pairs)
    if len(form) != len(pairs):
        raise FixRequest("a parameter stands twice", code="invalid_request")
    return {name: value for name, value in form.items() if value}
