"""The format of messages: CloudEvents 1.0, Kafka protocol binding, binary content mode.

The attributes are the message's ``ce_…`` headers, the value is the event's fields as JSON, the key is the stream. See
https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md (section 3.2);
``sequence`` and ``partitionkey`` are extensions that CloudEvents documents, the other extensions are our own.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from datetime import datetime

from libs import contracts
from libs.contracts.registry import decode
from libs.contracts.topics import owner_of
from libs.core.clock import isoformat_z
from libs.core.envelope import Envelope, Metadata
from libs.event_log.port import Message

CONTENT_TYPE = "application/json"
POSITION_UNKNOWN = 0

# Decoding looks up the event's type in the registry, so every module of contracts has to be imported.
for _module in pkgutil.iter_modules(contracts.__path__):
    importlib.import_module(f"{contracts.__name__}.{_module.name}")


def headers_of(
    *,
    topic: str,
    event_id: str,
    event_type: str,
    schema_version: int,
    stream: str,
    version: int,
    position: int,
    store_id: str,
    time: datetime,
    metadata: Metadata,
) -> dict[str, str]:
    """The headers of a message; attributes without a value are left out."""
    headers = {
        "content-type": CONTENT_TYPE,
        "ce_specversion": "1.0",
        "ce_id": event_id,
        "ce_type": f"{_short(topic)}.{event_type}.v{schema_version}",
        "ce_source": f"/datasync/{owner_of(topic)}",
        "ce_subject": stream,
        "ce_time": isoformat_z(time),
        "ce_dataschema": f"proto:datasync.v1.{message_name(event_type)}",
        "ce_partitionkey": stream,
        "ce_sequence": str(version),
        "ce_position": str(position),
        "ce_storeid": store_id,
        "ce_actor": metadata.actor,
    }
    if metadata.project_id is not None:
        headers["ce_projectid"] = str(metadata.project_id)
    if metadata.correlation_id:
        headers["ce_correlationid"] = metadata.correlation_id
    if metadata.causation_id:
        headers["ce_causationid"] = metadata.causation_id
    if metadata.traceparent:
        headers["traceparent"] = metadata.traceparent
    return headers


def encode(envelope: Envelope) -> dict[str, str]:
    """The headers of an event's message, whose key is ``envelope.stream`` and whose value is ``envelope.data_json``."""
    return headers_of(
        topic=envelope.data.TOPIC,
        event_id=envelope.id,
        event_type=envelope.type,
        schema_version=envelope.schema_version or envelope.data.SCHEMA_VERSION,
        stream=envelope.stream,
        version=envelope.version,
        position=envelope.position,
        store_id=envelope.store_id,
        time=envelope.time,
        metadata=envelope.metadata,
    )


def decode_message(topic: str, partition: int, offset: int, headers: Mapping[str, str], raw: bytes) -> Message:
    """Decode a message; never raises: one that can't be decoded has a ``failure``."""
    envelope: Envelope | None = None
    failure: str | None = None
    try:
        envelope = _envelope(topic, headers, raw)
    except Exception as error:  # noqa: BLE001 - whatever was written there must become a parked message
        failure = f"{type(error).__name__}: {error}"[:1000]
    position = headers.get("ce_position", "")
    return Message(
        topic=topic,
        partition=partition,
        offset=offset,
        position=int(position) if position.isdecimal() else POSITION_UNKNOWN,
        store_id=headers.get("ce_storeid", ""),
        stream=headers.get("ce_subject", ""),
        event_id=headers.get("ce_id", ""),
        event_type=headers.get("ce_type", ""),
        envelope=envelope,
        failure=failure,
        raw=raw,
        headers=headers,
    )


def message_name(event_type: str) -> str:
    """The protobuf message of an event type: ``SourceCreated`` for ``source_created``."""
    return "".join(word.capitalize() for word in event_type.split("_"))


def _envelope(topic: str, headers: Mapping[str, str], raw: bytes) -> Envelope:
    if headers["ce_specversion"] != "1.0":
        raise ValueError(f"CloudEvents {headers['ce_specversion']} is not understood")
    if not headers.get("content-type", CONTENT_TYPE).startswith(CONTENT_TYPE):
        raise ValueError(f"the content type {headers['content-type']} is not understood")
    _, event_type, version = headers["ce_type"].rsplit(".", 2)
    schema_version = int(version.removeprefix("v"))
    project_id = headers.get("ce_projectid")
    stream = headers["ce_subject"]
    position = int(headers["ce_position"])
    if position < 1 or "-" not in stream or not headers["ce_storeid"]:
        raise ValueError("the position, the stream or the store is missing")
    data, is_understood = decode(event_type, schema_version, raw, topic)
    return Envelope(
        id=headers["ce_id"],
        stream=stream,
        version=int(headers["ce_sequence"]),
        position=position,
        store_id=headers["ce_storeid"],
        time=datetime.fromisoformat(headers["ce_time"]),
        data=data,
        data_json=raw,
        metadata=Metadata(
            actor=headers.get("ce_actor", "system"),
            project_id=None if project_id is None else int(project_id),
            correlation_id=headers.get("ce_correlationid", ""),
            causation_id=headers.get("ce_causationid"),
            traceparent=headers.get("traceparent"),
        ),
        schema_version=schema_version,
        is_understood=is_understood,
    )


def _short(topic: str) -> str:
    """``datasync.catalog.v1`` carries types that begin with ``datasync.catalog``."""
    return topic.rsplit(".", 1)[0]
