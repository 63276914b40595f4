"""The adapter of the event log's port for Apache Kafka.

Readers keep the offsets that count in their own database; the consumer group's offsets only serve monitoring tools.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from libs.core.envelope import Envelope
from libs.event_log.kafka.client import OPEN_SECONDS_MAX, Brokers, admin_client
from libs.event_log.kafka.publisher import Publisher
from libs.event_log.kafka.subscription import KafkaSubscription, subscription_to
from libs.event_log.kafka.topics import ensure_topics
from libs.event_log.port import LogIdentity
from libs.process.kafka_security import PLAINTEXT, KafkaSecurity

LAST_MESSAGES = 100


class KafkaEventLog:
    """The log on a Kafka cluster.

    The declared topics are created or checked before the first use of any, so a service starts while the brokers are
    unreachable, and the brokers need not create topics by themselves.

    Args:
        bootstrap_servers: ``host:port``, several separated by commas.
        service: names the consumer group ``datasync.<service>``, whose lag monitoring tools show.
        topic_prefix: precedes the name of every topic and group on the cluster.
        security: protocol and credentials.
    """

    needs_relay = True

    def __init__(
        self, bootstrap_servers: str, service: str, topic_prefix: str = "", security: KafkaSecurity = PLAINTEXT
    ) -> None:
        self._brokers = Brokers(bootstrap_servers, security)
        self._client_id = f"datasync.{service}"
        self._prefix = topic_prefix
        self._publisher = Publisher(self._brokers, self._client_id)
        self._topics_lock = asyncio.Lock()
        self._topics_ensured = False

    async def publish(self, topic: str, envelopes: Sequence[Envelope]) -> None:
        """Publish in order; returns when all in-sync replicas have acknowledged all events."""
        await self._ensure_topics()
        await self._publisher.publish(self._prefix + topic, envelopes)

    async def last_position(self, topic: str, store_id: str) -> int:
        """The highest position among the last messages of each partition; the very last ones may be repetitions."""
        async with self.subscribe(topic, None) as subscription:
            async with asyncio.timeout(OPEN_SECONDS_MAX):
                messages = await subscription.last_messages(LAST_MESSAGES)
        return max((message.position for message in messages if message.store_id == store_id), default=0)

    @asynccontextmanager
    async def subscribe(self, topic: str, offsets: Mapping[int, int] | None) -> AsyncIterator[KafkaSubscription]:
        """Read all partitions of a topic from these offsets, or from their ends if ``offsets`` is None."""
        await self._ensure_topics()
        async with subscription_to(topic, offsets, self._brokers, self._client_id, self._prefix) as opened:
            yield opened

    async def identity(self) -> LogIdentity:
        """The cluster's id, as the brokers tell it."""
        async with admin_client(self._brokers) as admin:
            cluster = await admin.describe_cluster()
        return LogIdentity(kind="kafka", topic_prefix=self._prefix, cluster_id=cluster["cluster_id"] or "")

    async def close(self) -> None:
        """Close the producer; subscriptions close with their blocks."""
        await self._publisher.close()

    async def _ensure_topics(self) -> None:
        async with self._topics_lock:
            if not self._topics_ensured:
                await ensure_topics(self._brokers, self._prefix)
                self._topics_ensured = True
