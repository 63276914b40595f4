"""Publishes events: an idempotent producer with ``acks=all``, one batch in flight per partition."""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError
from aiokafka.partitioner import DefaultPartitioner

from libs.core.envelope import Envelope
from libs.event_log.cloudevents import encode
from libs.event_log.kafka.client import REQUEST_MS, Brokers, as_os_errors, close_within_limit

BATCH_BYTES_MAX = 1024 * 1024
PUBLISH_SECONDS_MAX = 20.0


class Publisher:
    """A producer, which is opened when something is published.

    Args:
        client_id: names the client in the brokers' logs and metrics.
    """

    def __init__(self, brokers: Brokers, client_id: str) -> None:
        self._brokers = brokers
        self._client_id = client_id
        self._partitioner = DefaultPartitioner()
        self._producer: AIOKafkaProducer | None = None

    async def publish(self, topic: str, events: Sequence[Envelope]) -> None:
        """Publish in order; returns when all in-sync replicas have acknowledged all events.

        One batch per partition is in flight at a time. With two, the first could expire before it was sent while the
        second got through, and events would be out of order.
        """
        try:
            with as_os_errors():
                async with asyncio.timeout(PUBLISH_SECONDS_MAX):
                    await self._publish(topic, events)
        except BaseException:
            # After a failure the sequence numbers of the idempotent producer no longer match those of the broker.
            await self.close()
            raise

    async def close(self) -> None:
        """Close the producer; the next event to publish opens another."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        await close_within_limit(producer.stop)
        # ``stop`` leaves these open when it does not finish in time.
        with suppress(KafkaError, asyncio.CancelledError):
            await producer._sender.close()
        await producer.client.close()

    async def _publish(self, topic: str, events: Sequence[Envelope]) -> None:
        producer = await self._open()
        waiting = self._by_partition(events, await _partitions_of(producer, topic))
        while waiting:
            acknowledgements = [
                await producer.send_batch(_batch_from(producer, queue), topic, partition=partition)
                for partition, queue in waiting.items()
            ]
            await asyncio.gather(*acknowledgements)
            waiting = {partition: queue for partition, queue in waiting.items() if queue}

    def _by_partition(self, events: Sequence[Envelope], partitions: list[int]) -> dict[int, deque[Envelope]]:
        """Events in order, by the partition that the default partitioner of every client chooses for their stream."""
        by_partition: dict[int, deque[Envelope]] = {}
        for event in events:
            partition = self._partitioner(event.stream.encode(), partitions, partitions)
            by_partition.setdefault(partition, deque()).append(event)
        return by_partition

    async def _open(self) -> AIOKafkaProducer:
        if self._producer is None:
            producer = AIOKafkaProducer(
                client_id=self._client_id,
                acks="all",
                enable_idempotence=True,
                request_timeout_ms=REQUEST_MS,
                max_batch_size=BATCH_BYTES_MAX,
                max_request_size=2 * BATCH_BYTES_MAX,
                **self._brokers.options(),
            )
            self._producer = producer
            await producer.start()
        return self._producer


async def _partitions_of(producer: AIOKafkaProducer, topic: str) -> list[int]:
    partitions = sorted(await producer.partitions_for(topic))
    if partitions != list(range(len(partitions))):
        raise ConnectionError(f"the broker does not know all partitions of {topic} at the moment")
    return partitions


def _batch_from(producer: AIOKafkaProducer, queue: deque[Envelope]) -> Any:
    """Take as many events from the queue as fit into one batch, and close the batch."""
    batch = producer.create_batch()
    while queue and _append(batch, queue[0]):
        queue.popleft()
    batch.close()
    return batch


def _append(batch: Any, event: Envelope) -> bool:
    """Append an event to a batch; False if there is no room for it. The first one always fits."""
    headers = [(key, value.encode()) for key, value in encode(event).items()]
    timestamp_ms = int(event.time.timestamp() * 1000)
    added = batch.append(timestamp=timestamp_ms, key=event.stream.encode(), value=event.data_json, headers=headers)
    return added is not None
