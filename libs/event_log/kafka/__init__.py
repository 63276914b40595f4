"""The event log on Apache Kafka; nothing else imports aiokafka."""

from libs.event_log.kafka.client import Brokers
from libs.event_log.kafka.log import KafkaEventLog
from libs.event_log.kafka.topics import DeclaredTopic, TopicMismatch, declared_topics, ensure_topics

__all__ = ["Brokers", "DeclaredTopic", "KafkaEventLog", "TopicMismatch", "declared_topics", "ensure_topics"]
