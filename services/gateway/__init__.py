"""The only public port: authenticates requests, forwards each to the service that owns its path, passes responses on.

It stores nothing but the counters of rate limits, and caches what auth says about a credential for less than a second.
It neither consumes nor emits events.
"""
