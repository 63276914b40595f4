"""The only public port: finds out who is calling, forwards to the service that owns the path, streams the answer back.

It owns nothing but the counters of rate limits, and keeps a credential's answer for less than a second. It consumes and
emits no events.
"""
