"""The way to the services behind: a request forwarded, its response passed on, bodies streamed both ways.

``forwarding`` is what the rest of the gateway calls. Below it, ``pool`` keeps the connections to one service,
``exchange`` is one request and its response on one of them, and ``wire`` reads and writes HTTP/1.1 without any I/O.
"""
