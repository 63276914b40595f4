"""What unit tests share."""

import logging
from collections.abc import Iterator

import pytest
import structlog

from libs.process.logs import REQUEST_LINES


@pytest.fixture
def logs_put_back() -> Iterator[None]:
    """Restores the process's log configuration after the test."""
    before, service = structlog.get_config(), REQUEST_LINES.service
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.configure(**before)
    root.handlers, root.level = handlers, level
    REQUEST_LINES.service = service
