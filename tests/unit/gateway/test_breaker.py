"""When a service that rejects connections is tried."""

from services.gateway.upstream.breaker import FAILURES_MAX, OPEN_SECONDS, Breaker


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _open(clock: _Clock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(FAILURES_MAX):
        assert breaker.refuses_for_seconds() is None
        breaker.failed()
    return breaker


def test_it_stays_closed_until_consecutive_failures() -> None:
    breaker = Breaker(_Clock())
    for _ in range(3 * FAILURES_MAX):
        breaker.failed()
        breaker.connected()
        assert breaker.refuses_for_seconds() is None


def test_it_refuses_for_a_second_after_consecutive_failures() -> None:
    clock = _Clock()
    breaker = _open(clock)
    assert breaker.refuses_for_seconds() == OPEN_SECONDS
    clock.now += OPEN_SECONDS / 2
    assert breaker.refuses_for_seconds() == OPEN_SECONDS / 2


def test_one_request_probes_for_all() -> None:
    clock = _Clock()
    breaker = _open(clock)
    clock.now += OPEN_SECONDS
    assert breaker.refuses_for_seconds() is None
    assert breaker.refuses_for_seconds() is not None
    breaker.connected()
    assert breaker.refuses_for_seconds() is None


def test_a_failed_probe_opens_it_again() -> None:
    clock = _Clock()
    breaker = _open(clock)
    clock.now += OPEN_SECONDS
    assert breaker.refuses_for_seconds() is None
    breaker.failed()
    assert breaker.refuses_for_seconds() == OPEN_SECONDS


def test_a_probe_without_a_result_is_followed_by_another() -> None:
    clock = _Clock()
    breaker = _open(clock)
    clock.now += OPEN_SECONDS
    assert breaker.refuses_for_seconds() is None
    breaker.gave_up()
    assert breaker.refuses_for_seconds() is None
