"""A source, a destination and the services that a run talks to."""

from tests.integration.connectors.conftest import destination, lake, source

__all__ = ["destination", "lake", "source"]
