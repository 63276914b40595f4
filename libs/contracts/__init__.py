"""The public language of the services: events, one module a topic, and the internal calls."""
