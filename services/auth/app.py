"""Wires the auth service together."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aiohttp import web

from libs.process.version import installed_version
from libs.service.definition import ServiceContext, ServiceDefinition
from services.auth.accounts import Accounts
from services.auth.config import AuthSettings
from services.auth.credentials import Credentials
from services.auth.domain.api_key import API_KEY
from services.auth.domain.oauth_client import OAUTH_CLIENT
from services.auth.domain.project import PROJECT
from services.auth.domain.user import USER
from services.auth.expiry import ExpiryAnnouncer
from services.auth.http import (
    AccountRoutes,
    ClientRoutes,
    KeyRoutes,
    PlatformRoutes,
    ProjectRoutes,
    TokenRoutes,
    UserRoutes,
    internal_routes,
)
from services.auth.keys import Keys
from services.auth.oauth import OauthClients, OauthTokens
from services.auth.passwords import Passwords
from services.auth.queries import INDEXES, LOGIN_FAILURES, AuthQueries
from services.auth.sessions import Sessions
from services.auth.throttle import LoginThrottle, Policy
from services.auth.usage import Usage


@asynccontextmanager
async def start(context: ServiceContext[AuthSettings]) -> AsyncIterator[Sequence[web.AbstractRouteDef]]:
    """Open the service's own parts; the use of sessions and keys that is still in memory is written at the end."""
    settings, documents, commands, clock = context.settings, context.documents, context.commands, context.clock
    queries = AuthQueries(documents)
    sessions = Sessions(documents, clock, settings.session_ttl_seconds)
    usage = Usage(documents, sessions, clock)
    passwords = Passwords()
    bootstrap_key = None if settings.api_key is None else settings.api_key.get_secret_value()
    accounts = Accounts(
        commands=commands,
        queries=queries,
        sequences=context.sequences,
        passwords=passwords,
        sessions=sessions,
        throttle_accounts=_throttle(context, "account", settings.login_free_attempts),
        throttle_addresses=_throttle(context, "address", settings.login_free_attempts_per_address),
    )
    keys = Keys(documents, commands, queries, clock)
    clients = OauthClients(documents, commands, queries)
    tokens = OauthTokens(
        documents,
        queries,
        clock,
        throttle_clients=_throttle(context, "token_client", settings.login_free_attempts),
        throttle_addresses=_throttle(context, "token_address", settings.login_free_attempts_per_address),
    )
    credentials = Credentials(queries, sessions, tokens, usage, clock, bootstrap_key)
    announcer = ExpiryAnnouncer(commands, queries, clock)
    context.tasks.start("usage", usage.run)
    context.tasks.start("key-expiry", lambda: context.leases.run_while_leader("key-expiry", announcer.run))
    try:
        yield [
            *AccountRoutes(settings, accounts, sessions, passwords).routes(),
            *PlatformRoutes(installed_version()).routes(),
            *ProjectRoutes(documents, commands, queries).routes(),
            *UserRoutes(documents, commands, accounts, queries, sessions, passwords).routes(),
            *(route for root in ("/api/v2", "/v2") for route in KeyRoutes(root, keys, queries).routes()),
            *(route for root in ("/api/v2", "/v2") for route in ClientRoutes(root, clients, queries).routes()),
            *TokenRoutes(tokens).routes(),
            *internal_routes(credentials),
        ]
    finally:
        passwords.close()
        await usage.close()


def _throttle(context: ServiceContext[AuthSettings], kind: str, free_attempts: int) -> LoginThrottle:
    settings = context.settings
    policy = Policy(free_attempts, settings.login_delay_seconds_first, settings.login_delay_seconds_max)
    failures = context.documents.plain(LOGIN_FAILURES)
    return LoginThrottle(failures, context.clock, kind, policy if settings.rate_limits else None)


SERVICE = ServiceDefinition(
    name="auth",
    settings=AuthSettings,
    aggregates=(USER, PROJECT, API_KEY, OAUTH_CLIENT),
    indexes=INDEXES,
    start=start,
)
