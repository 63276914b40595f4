"""Commands into events and events into documents: the write path, its store, relays, consumers and rebuilds."""
