"""A Java program reads a topic with only the stock Kafka client and the CloudEvents specification."""

import asyncio
import json
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest

from libs.contracts.catalog import TOPIC, SourceCreated
from libs.core.envelope import Envelope, Event, Metadata
from libs.core.ids import uuid7
from libs.event_log.kafka import Brokers, KafkaEventLog, ensure_topics
from libs.testing.servers import kafka_jars

READER = Path(__file__).with_name("java") / "TopicReader.java"
NOW = datetime(2026, 2, 21, 10, 30, 0, 123_000, tzinfo=UTC)
METADATA = Metadata("Zoë", 123, "request-1", uuid7(), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")

pytestmark = pytest.mark.kafka


def envelope(stream: str, position: int, event: Event, metadata: Metadata = METADATA) -> Envelope:
    data_json = event.model_dump_json().encode()
    return Envelope(uuid7(), stream, 1, position, "store-1", NOW, event, data_json, metadata)


async def read_with_java(bootstrap_servers: str, topic: str, count: int) -> list[dict[str, object]]:
    reader = await asyncio.create_subprocess_exec(
        "java", "-Xmx256m", "-XX:TieredStopAtLevel=1", "-cp", f"{kafka_jars()}/*", str(READER),
        bootstrap_servers, topic, str(count),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        out, errors = await reader.communicate()
    assert reader.returncode == 0, errors.decode()[-2000:]
    return [json.loads(line) for line in out.decode().splitlines() if line.startswith("{")]


async def test_a_java_program_reads_events_and_chooses_the_same_partitions(kafka: str) -> None:
    prefix = f"{uuid.uuid4().hex[:8]}."
    await ensure_topics(Brokers(kafka), prefix)
    log = KafkaEventLog(kafka, "catalog", prefix)
    created = SourceCreated(name="café", type="postgres", version="v0.1.0", config_json='{"port": 5432.0}')
    sent = [envelope(f"source-{number}", number, created) for number in range(1, 41)]
    await log.publish(TOPIC, sent)
    await log.close()

    lines = await read_with_java(kafka, prefix + TOPIC, len(sent))

    assert len(lines) == len(sent)
    by_key = {line["key"]: line for line in lines}
    for event in sent:
        line = by_key[event.stream]
        assert line["partition"] == line["default_partition"]
        assert line["data"] == json.loads(event.data_json)
        assert line["epoch_ms"] == int(NOW.timestamp() * 1000)
        assert line["headers"] == {
            "content-type": "application/json",
            "ce_specversion": "1.0",
            "ce_id": event.id,
            "ce_type": "datasync.catalog.source_created.v1",
            "ce_source": "/datasync/catalog",
            "ce_subject": event.stream,
            "ce_time": "2026-02-21T10:30:00.123Z",
            "ce_dataschema": "proto:datasync.v1.SourceCreated",
            "ce_partitionkey": event.stream,
            "ce_sequence": "1",
            "ce_position": str(event.position),
            "ce_storeid": "store-1",
            "ce_projectid": "123",
            "ce_actor": "Zoë",
            "ce_correlationid": "request-1",
            "ce_causationid": METADATA.causation_id,
            "traceparent": METADATA.traceparent,
        }
