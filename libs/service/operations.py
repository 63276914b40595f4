"""What operators ask of a service's data from outside, while the service runs: rebuilds, parked messages, new keys."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from libs.core.errors import NotFound
from libs.event_log import open_event_log
from libs.event_log.port import EventLog
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.log_identity import require_same
from libs.eventsourcing.parking import ParkedMessage, list_parked, request_retry
from libs.eventsourcing.rebuild import Rebuild, RebuildReport
from libs.eventsourcing.stops import require_at_rest
from libs.mongodb.client import ConnectionFailure, connect
from libs.mongodb.encryption import Keyring, rewrap_secrets
from libs.process.settings import FromJson, StoreSettings
from libs.service.repair import RepairReport, renew_identity, repair_topic
from libs.service.running import ServiceDefinition


class StoreUnreachable(Exception):
    """No MongoDB answers where the settings say; the message names the address."""


class RewrapSettings(StoreSettings):
    """The only command that opens secrets needs the keys to them."""

    encryption_keys: FromJson[dict[str, SecretStr]] = Field(min_length=1)

    @field_validator("encryption_keys")
    @classmethod
    def _usable_keys(cls, keys: dict[str, SecretStr]) -> dict[str, SecretStr]:
        Keyring(keys)
        return keys


async def rebuild(definition: ServiceDefinition[Any], settings: StoreSettings, *, swap: bool) -> RebuildReport:
    """Make every document of a service anew from events; see ``libs.eventsourcing.rebuild``."""
    async with _opened_store_and_log(definition, settings) as (store, event_log):
        anew = Rebuild(
            store,
            event_log,
            aggregates=definition.aggregates,
            projections=definition.projections,
            indexes=definition.indexes,
        )
        return await anew.run(swap=swap)


async def repair(definition: ServiceDefinition[Any], settings: StoreSettings, topic: str) -> RepairReport:
    """Set a topic going again that the service stopped following; see ``libs.service.repair``."""
    async with _opened_store_and_log(definition, settings) as (store, event_log):
        return await repair_topic(definition, store, event_log, topic)


async def restored(definition: ServiceDefinition[Any], settings: StoreSettings) -> None:
    """Tell a service that its database was restored from a backup; see ``libs.service.repair``.

    Raises:
        FixRequest: the service runs, and its relay does not wait for this.
    """
    async with _opened_store(definition, settings) as store:
        await require_at_rest(store)
        await renew_identity(store)


async def parked_messages(definition: ServiceDefinition[Any], settings: StoreSettings) -> list[ParkedMessage]:
    """What a service could not handle and has put aside."""
    async with _opened_store(definition, settings) as store:
        return await list_parked(store.database)


async def retry_parked(
    definition: ServiceDefinition[Any], settings: StoreSettings, topic: str | None, stream: str | None
) -> int:
    """Have the running service try parked messages again; returns how many wait for it."""
    async with _opened_store(definition, settings) as store:
        return await request_retry(store.database, topic, stream)


async def rewrap(definition: ServiceDefinition[Any], settings: RewrapSettings) -> int:
    """Wrap every secret of a service by the first of its encryption keys; returns how many were wrapped anew."""
    async with _opened_store(definition, settings) as store:
        return await rewrap_secrets(store.database["secrets"], Keyring(settings.encryption_keys))


@asynccontextmanager
async def _opened_store(definition: ServiceDefinition[Any], settings: StoreSettings) -> AsyncIterator[EventStore]:
    """The store of a service that has run: a command never makes one where there is none."""
    client = connect(settings.mongodb_url, "datasync")
    try:
        store = EventStore(client, settings.database_prefix + definition.name)
        if await store.database["head"].find_one({"_id": "head"}) is None:
            raise NotFound(
                f"there is no data of {definition.name} here: MongoDB has no database {store.database.name} with a head"
            )
        yield store
    except ConnectionFailure as error:
        address = urlsplit(settings.mongodb_url).netloc.rpartition("@")[2]
        raise StoreUnreachable(f"no MongoDB at {address}") from error
    finally:
        client.close()


@asynccontextmanager
async def _opened_store_and_log(
    definition: ServiceDefinition[Any], settings: StoreSettings
) -> AsyncIterator[tuple[EventStore, EventLog]]:
    """Both, after a check that the service uses this log."""
    async with _opened_store(definition, settings) as store:
        event_log = await open_event_log(settings, store.client, definition.name)
        try:
            await require_same(store, event_log)
            await store.open(definition.collections, definition.indexes)
            yield store, event_log
        finally:
            await event_log.close()
