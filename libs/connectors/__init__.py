"""Connectors: how DataSync reads from and writes to the systems that people connect.

Each folder is one system. ``registry`` knows them all without importing a driver; ``protocol`` says what a connector
does; ``form`` turns a configuration's model into the specification that the API returns.
"""
