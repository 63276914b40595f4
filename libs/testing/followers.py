"""A service that owns things and a service that follows its events, for tests and benchmarks of both together."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from libs.core.clock import SystemClock
from libs.core.decider import Act, Aggregate, Projection, Reaction
from libs.core.entity import Entity
from libs.core.envelope import Envelope, Metadata
from libs.event_log.embedded import EmbeddedEventLog
from libs.event_log.kafka import Brokers, DeclaredTopic, KafkaEventLog, ensure_topics
from libs.event_log.port import EventLog
from libs.eventsourcing.command_handler import CommandHandler
from libs.eventsourcing.consumer import Consumer
from libs.eventsourcing.event_store import EventStore
from libs.eventsourcing.rebuild import Rebuild
from libs.eventsourcing.relay import Relay
from libs.mongodb.client import Client, connect
from libs.mongodb.leases import Leases
from libs.process.health import Health
from libs.testing.things import THING, TOPIC, MakeThing, RenameThing, Thing, ThingCommand, ThingMade, decide, evolve

PROJECT = Metadata(actor="ann", project_id=7, correlation_id="request-1")
TOPICS = [DeclaredTopic(TOPIC, 12, -1, {"max.message.bytes": "2097152"})]
ECHO: Aggregate[Thing] = Aggregate("echo", "echoes", Thing, decide, evolve)


def view_of(document: dict[str, Any] | None, envelope: Envelope) -> dict[str, Any]:
    """The last name of a thing and the versions of the events that made it."""
    versions = [] if document is None else document["versions"]
    name = getattr(envelope.data, "name", None)
    return {"name": name, "versions": [*versions, envelope.version]}


@dataclass
class Behaviour:
    """What a follower does with an event; a test may change it while the follower runs."""

    apply: Callable[[dict[str, Any] | None, Envelope], dict[str, Any] | None] = view_of
    refuses: set[str] = field(default_factory=set)
    command: Callable[[str], ThingCommand] = MakeThing

    def projection(self) -> Projection:
        return Projection("views", TOPIC, lambda envelope: envelope.entity_id, self._apply)

    def _apply(self, document: dict[str, Any] | None, envelope: Envelope) -> dict[str, Any] | None:
        return self.apply(document, envelope)

    def reaction(self) -> Reaction:
        """Each new thing causes a command for its echo, by default ``MakeThing``."""

        def react(envelope: Envelope) -> Sequence[Act]:
            if not isinstance(envelope.data, ThingMade):
                return ()
            if envelope.data.name in self.refuses:
                raise ValueError(f"no echo of {envelope.data.name}")
            return [Act(ECHO, envelope.entity_id, self.command(envelope.data.name))]

        return Reaction(TOPIC, react)


@dataclass
class Installation:
    """A MongoDB and an event log, and the services on them."""

    client: Client
    database_prefix: str
    open_log: Callable[[str], EventLog]

    @asynccontextmanager
    async def owner(self, *, relays: int = 1) -> AsyncIterator["Owner"]:
        """The owner of things, with this number of relays, all of them active."""
        async with AsyncExitStack() as stack:
            store = EventStore(self.client, f"{self.database_prefix}things")
            await store.open([THING.collection], {})
            commands = CommandHandler(store, SystemClock(), [THING])
            commands.start()
            stack.push_async_callback(commands.close)
            running = []
            for _ in range(relays):
                event_log = self.open_log("things")
                stack.push_async_callback(event_log.close)
                if event_log.needs_relay:
                    running.append(Relay(store, event_log, commands))
                    stack.push_async_callback(_stop, asyncio.create_task(running[-1].run()))
            yield Owner(store, commands, running)

    @asynccontextmanager
    async def follower(self, behaviour: Behaviour | None = None, *, lease: bool = True) -> AsyncIterator["Follower"]:
        """One instance of a service that follows the things."""
        behaviour = behaviour or Behaviour()
        async with AsyncExitStack() as stack:
            store = EventStore(self.client, f"{self.database_prefix}follower")
            await store.open(["views", ECHO.collection], {})
            commands = CommandHandler(store, SystemClock(), [ECHO])
            commands.start()
            stack.push_async_callback(commands.close)
            event_log = self.open_log("follower")
            stack.push_async_callback(event_log.close)
            health = Health()

            async def refold() -> bool:
                await Rebuild(store, event_log, projections=[behaviour.projection()]).run(grace_seconds=0)
                return True

            consumer = Consumer(
                topic=TOPIC,
                event_log=event_log,
                store=store,
                commands=commands,
                health=health,
                projections=[behaviour.projection()],
                reactions=[behaviour.reaction()],
                refold=refold,
            )
            leases = Leases(store.database["leases"])
            work = leases.run_while_leader("consumer", consumer.run) if lease else consumer.run()
            stack.push_async_callback(_stop, asyncio.ensure_future(work))
            yield Follower(store, commands, health, consumer)


@dataclass
class Owner:
    """A running owner."""

    store: EventStore
    commands: CommandHandler
    relays: Sequence[Relay]

    async def make(self, identifier: str, name: str) -> Entity[Thing]:
        return await self.commands.handle(THING, identifier, MakeThing(name), PROJECT)

    async def rename(self, identifier: str, name: str) -> Entity[Thing]:
        return await self.commands.handle(THING, identifier, RenameThing(name), PROJECT)


@dataclass
class Follower:
    """A running follower."""

    store: EventStore
    commands: CommandHandler
    health: Health
    consumer: Consumer

    async def views(self) -> dict[str, Any]:
        cursor = self.store.database[self.store.live_collection("views")].find({})
        return {document.pop("_id"): document async for document in cursor}

    async def echoes(self) -> dict[str, int]:
        """The version of each echo: 1 if it was made once."""
        cursor = self.store.database[self.store.live_collection("echoes")].find({})
        return {document["_id"]: document["version"] async for document in cursor}


async def history(store: EventStore, stream: str) -> list[Envelope]:
    """All events of a stream, oldest first."""
    return [envelope async for envelope in store.read_stream(stream)]


@asynccontextmanager
async def installation(
    mongodb_url: str, database_prefix: str, bootstrap_servers: str | None
) -> AsyncIterator[Installation]:
    """On Kafka with topics of its own, or on the embedded log if there are no bootstrap servers."""
    client = connect(mongodb_url)

    def open_log(service: str) -> EventLog:
        if bootstrap_servers is None:
            return EmbeddedEventLog(client, database_prefix, [TOPIC])
        return KafkaEventLog(bootstrap_servers, service, topic_prefix)

    topic_prefix = f"{database_prefix}."
    if bootstrap_servers is not None:
        await ensure_topics(Brokers(bootstrap_servers), topic_prefix, TOPICS)
    try:
        yield Installation(client, database_prefix, open_log)
    finally:
        client.close()


async def _stop(task: "asyncio.Future[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
