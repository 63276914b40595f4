"""What all uses of aiokafka have in common: how brokers are reached, time limits, and errors."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, OffsetOutOfRangeError

from libs.process.kafka_security import PLAINTEXT, KafkaSecurity

REQUEST_MS = 10_000
ANSWER_SECONDS_MAX = 10.0
OPEN_SECONDS_MAX = 30.0
CLOSE_SECONDS_MAX = 2.0

log = structlog.get_logger(__name__)

# While a broker is unreachable the client logs dozens of lines a second; relay and consumers log one per attempt.
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Brokers:
    """How the brokers of a cluster are reached.

    Args:
        bootstrap_servers: ``host:port``, several separated by commas.
        security: protocol and credentials.
    """

    bootstrap_servers: str
    security: KafkaSecurity = PLAINTEXT

    def options(self) -> dict[str, Any]:
        """The options that every client of the cluster needs."""
        return {"bootstrap_servers": self.bootstrap_servers, **self.security.options()}


@asynccontextmanager
async def admin_client(brokers: Brokers) -> AsyncIterator[AIOKafkaAdminClient]:
    """A client for administration; everything that is done with it has to be done within 30 seconds."""
    with as_os_errors():
        async with asyncio.timeout(OPEN_SECONDS_MAX):
            admin = AIOKafkaAdminClient(request_timeout_ms=REQUEST_MS, **brokers.options())
            try:
                await admin.start()
                yield admin
            finally:
                await admin.close()


@contextmanager
def as_os_errors() -> Iterator[None]:
    """Turn the errors of aiokafka into ``OSError``, as the port says, except that an offset is out of range."""
    try:
        yield
    except OffsetOutOfRangeError:
        raise
    except KafkaError as error:
        raise ConnectionError(f"Kafka: {error}") from error


async def close_within_limit(stop: Callable[[], Awaitable[None]]) -> None:
    """Close a client; one that does not close within 2 seconds is abandoned."""
    try:
        async with asyncio.timeout(CLOSE_SECONDS_MAX):
            await stop()
    except (KafkaError, OSError, TimeoutError) as error:
        log.info("kafka_client_closed_late", error=type(error).__name__)
