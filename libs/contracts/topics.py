"""The topics of the log, each with its owner: the only service that publishes on it.

The same topics are declared for Kafka in ``libs/event_log/kafka/topics.yaml``.
"""

from collections.abc import Mapping
from types import MappingProxyType

OWNERS: Mapping[str, str] = MappingProxyType(
    {
        "datasync.auth.v1": "auth",
        "datasync.catalog.v1": "catalog",
        "datasync.jobs.v1": "job_orchestrator",
        "datasync.records.v1": "record_sync",
        "datasync.runs.v1": "job_orchestrator",
    }
)


def owner_of(topic: str) -> str:
    """The service that publishes on a topic; for a topic that is not listed, the second word of its name."""
    return OWNERS.get(topic) or topic.split(".")[1]
