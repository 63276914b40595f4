"""Requests to another service of the installation, at all of its addresses.

``pool`` keeps the connections to one service, ``endpoints`` says at which of its addresses, ``exchange`` is one request
and its response on one connection, and ``wire`` reads and writes HTTP/1.1 without any I/O.
"""
