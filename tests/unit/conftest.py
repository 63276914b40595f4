"""What unit tests share."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from libs.process.logs import _RequestLines


@pytest.fixture
def logs_put_back() -> Iterator[None]:
    """Logs are a process's own: a test that configures them leaves them as they were to those that follow."""
    before, service = structlog.get_config(), _RequestLines.service
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.configure(**before)
    root.handlers, root.level = handlers, level
    _RequestLines.service = service
