"""The event log: one port, two adapters (Kafka and embedded), one contract suite."""

from libs.event_log.port import EventLog
from libs.mongodb.client import Client
from libs.process.settings import StoreSettings


async def open_event_log(settings: StoreSettings, client: Client, service: str = "datasync") -> EventLog:
    """The log that the settings choose: Kafka if it is configured, otherwise the event stores themselves."""
    if settings.kafka_bootstrap_servers is None:
        # An installation uses only one of the two, so the other is not imported.
        from libs.event_log.embedded import EmbeddedEventLog  # noqa: PLC0415

        return EmbeddedEventLog(client, settings.database_prefix)
    from libs.event_log.kafka import KafkaEventLog  # noqa: PLC0415

    return KafkaEventLog(
        settings.kafka_bootstrap_servers, service, settings.kafka_topic_prefix, settings.kafka_security
    )
