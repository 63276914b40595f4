"""The operator's commands on a service's data, from outside the service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator

from libs.core.errors import FixRequest, NotFound
from libs.event_log import open_event_log
from libs.event_log.kafka import Brokers, declared_topics, ensure_topics
from libs.event_log.port import EventLog
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.log_identity import require_same_log
from libs.eventsourcing.parking import ParkedMessage, list_parked, request_retry
from libs.eventsourcing.rebuild import Rebuild, RebuildReport
from libs.eventsourcing.stops import require_at_rest
from libs.mongodb.client import ConnectionFailure, connect
from libs.mongodb.encryption import Keyring, rewrap_secrets
from libs.process.setting_types import FromJson
from libs.process.settings import StoreSettings
from libs.service.definition import AnyDefinition
from libs.service.repair import RepairReport, renew_identity, repair_topic


class StoreUnreachable(Exception):
    """There is no MongoDB at the address in the settings, which the message names."""


class RewrapSettings(StoreSettings):
    """The only command that decrypts secrets needs the keys."""

    encryption_keys: FromJson[dict[str, SecretStr]] = Field(min_length=1)

    @field_validator("encryption_keys")
    @classmethod
    def _usable_keys(cls, keys: dict[str, SecretStr]) -> dict[str, SecretStr]:
        Keyring(keys)
        return keys


async def topics(settings: StoreSettings) -> list[str]:
    """Create the declared topics that are missing and check the others; returns their names.

    Raises:
        FixRequest: the settings name no brokers.
        TopicMismatch: a topic has another number of partitions than declared.
        OSError | TimeoutError: the brokers can't be reached.
    """
    if settings.kafka_bootstrap_servers is None:
        raise FixRequest("KAFKA_BOOTSTRAP_SERVERS is not set: without Kafka there are no topics")
    brokers = Brokers(settings.kafka_bootstrap_servers, settings.kafka_security)
    await ensure_topics(brokers, settings.kafka_topic_prefix)
    return [settings.kafka_topic_prefix + topic.name for topic in declared_topics()]


async def rebuild(definition: AnyDefinition, settings: StoreSettings, *, swap: bool) -> RebuildReport:
    """Rebuild every document of a service from events; see ``libs.eventsourcing.rebuild``."""
    async with _opened_store_and_log(definition, settings) as (store, event_log):
        return await Rebuild.of(definition, store, event_log).run(swap=swap)


async def repair(definition: AnyDefinition, settings: StoreSettings, topic: str) -> RepairReport:
    """Set a topic going again that the service stopped following; see ``libs.service.repair``."""
    async with _opened_store_and_log(definition, settings) as (store, event_log):
        return await repair_topic(definition, store, event_log, topic)


async def restored(definition: AnyDefinition, settings: StoreSettings) -> None:
    """Tell a service that its database was restored from a backup; see ``libs.service.repair``.

    Raises:
        FixRequest: the service runs, and its relay does not wait for this.
    """
    async with _opened_store(definition, settings) as store:
        await require_at_rest(store)
        await renew_identity(store)


async def parked_messages(definition: AnyDefinition, settings: StoreSettings) -> list[ParkedMessage]:
    """The messages that a service could not handle."""
    async with _opened_store(definition, settings) as store:
        return await list_parked(store.database)


async def retry_parked(
    definition: AnyDefinition, settings: StoreSettings, topic: str | None, stream: str | None
) -> int:
    """Have the running service retry parked messages; returns how many there are."""
    async with _opened_store(definition, settings) as store:
        return await request_retry(store.database, topic, stream)


async def rewrap(definition: AnyDefinition, settings: RewrapSettings) -> int:
    """Encrypt the keys of a service's secrets with the first encryption key; returns how many were changed."""
    async with _opened_store(definition, settings) as store:
        return await rewrap_secrets(store.database["secrets"], Keyring(settings.encryption_keys))


@asynccontextmanager
async def _opened_store(definition: AnyDefinition, settings: StoreSettings) -> AsyncIterator[EventStore]:
    """The store of a service that has run before; a command never creates one."""
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
    definition: AnyDefinition, settings: StoreSettings
) -> AsyncIterator[tuple[EventStore, EventLog]]:
    """Both, if the service uses this log."""
    async with _opened_store(definition, settings) as store:
        event_log = await open_event_log(settings, store.client, definition.name)
        try:
            await require_same_log(store, event_log)
            await store.open(definition.collections, definition.indexes)
            yield store, event_log
        finally:
            await event_log.close()
