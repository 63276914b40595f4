"""No answer ever reaches another than it was meant for."""

import pytest

from libs.testing.walks import Walk
from tests.integration.gateway.desynchronisation import fuzz

REQUESTS = 100_000
"""About 50 seconds on two cores; ``python -m tests.benchmarks.desynchronisation 1000000`` sends a million."""


@pytest.mark.timeout(1800)
async def test_nobody_gets_an_answer_that_was_meant_for_somebody_else(walk: Walk) -> None:
    """Two tenants, every shape of request and answer, callers and services that hang up at any point."""
    seed, requests = walk.random.randrange(1 << 32), walk.rounds(REQUESTS, 10 * REQUESTS)
    report = await fuzz(requests, seed)
    assert report.wrong == [], f"seed {seed}"
    assert report.outcomes["answered"] > requests / 2, f"seed {seed}: {report.outcomes}"
    assert report.outcomes["hung up"] > requests / 10
