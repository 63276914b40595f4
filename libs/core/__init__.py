"""The pure core of every service: aggregates, event envelopes, errors, ids, time, strict JSON. No I/O."""
