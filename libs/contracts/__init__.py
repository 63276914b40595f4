"""What the services tell each other: events, one module per topic, and the internal calls."""
