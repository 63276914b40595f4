"""The way to the services behind: a request forwarded, its response passed on, bodies streamed both ways.

``forwarding`` is what the rest of the gateway calls; the connections are those of ``libs.web.upstream``.
"""
