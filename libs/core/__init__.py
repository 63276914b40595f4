"""The pure centre every service stands on: aggregates, event envelopes, errors, ids, time, strict JSON. No I/O."""
