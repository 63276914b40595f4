"""The event log: one port, two adapters (Kafka and embedded), one contract suite."""
