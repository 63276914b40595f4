"""An event as a document of the collection ``events``, and back."""

from collections.abc import Mapping
from typing import Any

import orjson

from libs.contracts.registry import decode
from libs.core.envelope import Envelope, Metadata
from libs.mongodb.client import Document


def document_of(envelope: Envelope) -> Document:
    """The stored form of an event."""
    metadata = envelope.metadata
    return {
        "_id": envelope.id,
        "stream": envelope.stream,
        "version": envelope.version,
        "position": envelope.position,
        "type": envelope.data.TYPE,
        "schema_version": envelope.schema_version or envelope.data.SCHEMA_VERSION,
        "topic": envelope.data.TOPIC,
        "time": envelope.time,
        "data": envelope.data_json.decode(),
        "actor": metadata.actor,
        "project_id": metadata.project_id,
        "correlation_id": metadata.correlation_id,
        "causation_id": metadata.causation_id,
        "traceparent": metadata.traceparent,
    }


def envelope_of(document: Mapping[str, Any], store_id: str) -> Envelope:
    """The event in a stored document, upcast to its present version."""
    data_json = document["data"].encode()
    data, is_understood = decode(document["type"], document["schema_version"], data_json, document["topic"])
    return Envelope(
        id=document["_id"],
        stream=document["stream"],
        version=document["version"],
        position=document["position"],
        store_id=store_id,
        time=document["time"],
        data=data,
        data_json=data_json,
        metadata=Metadata.stored(document),
        schema_version=document["schema_version"],
        is_understood=is_understood,
    )


def canonical_document(document: Mapping[str, Any]) -> bytes:
    """A document's canonical JSON, which rebuilds hash and compare."""
    return orjson.dumps(document, option=orjson.OPT_SORT_KEYS | orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS, default=str)
