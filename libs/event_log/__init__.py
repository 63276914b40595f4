"""The event log: one port, two adapters (Kafka and embedded), one contract suite."""

from libs.event_log.port import EventLog
from libs.mongodb.client import Client
from libs.process.settings import StoreSettings


async def open_event_log(settings: StoreSettings, client: Client, service: str = "datasync") -> EventLog:
    """The log that the settings choose: Kafka where it is configured, else the owners' own stores."""
    if settings.kafka_bootstrap_servers is None:
        # Imported here because an installation uses one of the two.
        from libs.event_log.embedded import EmbeddedEventLog  # noqa: PLC0415

        return EmbeddedEventLog(client, settings.database_prefix)
    from libs.event_log.kafka import KafkaEventLog  # noqa: PLC0415

    return KafkaEventLog(
        settings.kafka_bootstrap_servers, service, settings.kafka_topic_prefix, settings.kafka_security
    )
