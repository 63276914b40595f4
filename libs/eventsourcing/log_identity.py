"""Records in a service's store which event log it uses, and refuses to operate on the store with another log."""

import asyncio

import structlog

from libs.core.errors import FixRequest
from libs.event_log.port import EventLog, LogIdentity
from libs.eventsourcing.event_store import EventStore

RETRY_SECONDS = 5.0

log = structlog.get_logger(__name__)


async def record_log(store: EventStore, event_log: EventLog) -> None:
    """Record which log the running service uses, as soon as the log is reachable."""
    while True:
        try:
            identity = await event_log.identity()
        except OSError as error:
            log.debug("log_not_identified", error=str(error)[:200])
            await asyncio.sleep(RETRY_SECONDS)
            continue
        document = {"_id": "event_log", **identity.model_dump()}
        await store.database["installation"].replace_one({"_id": "event_log"}, document, upsert=True)
        return


async def require_same_log(store: EventStore, event_log: EventLog) -> None:
    """Raise ``FixRequest`` if the service last ran with another log."""
    document = await store.database["installation"].find_one({"_id": "event_log"})
    if document is None:
        return
    known = LogIdentity.model_validate({name: document.get(name, "") for name in LogIdentity.model_fields})
    given = await event_log.identity()
    if given != known:
        raise FixRequest(
            f"the events of {store.database.name} are on {known}, but the settings here name {given}; nothing was "
            "done. Set KAFKA_BOOTSTRAP_SERVERS and KAFKA_TOPIC_PREFIX as the service has them, or its DATA_DIR"
        )
