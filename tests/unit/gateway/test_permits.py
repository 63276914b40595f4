"""The laws of rate limits over any interleaving of gateways: the limit is kept, ``Remaining`` lags a second at most."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from libs.testing.walks import examples
from services.gateway.rate_limits.permits import LEASE_MS, Account, LeaseRequest, Policy, Verdict
from tests.unit.gateway.counter_model import Counter

PERIOD_SECONDS = 4
START_MS = 1_000_000_000_000


@dataclass
class World:
    """Gateways with clocks of their own around one counter; time passes only between steps."""

    limit: int
    ahead_ms: list[int]
    server_ms: int = START_MS
    leases: int = 0
    admitted_ms: dict[int, list[int]] = field(default_factory=dict)
    late: list[LeaseRequest] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = Policy("p", self.limit, PERIOD_SECONDS)
        self.counter = Counter(self.policy)
        self.accounts = [Account(self.policy) for _ in self.ahead_ms]

    def clock_ms(self, gateway: int) -> float:
        return self.server_ms + self.ahead_ms[gateway]

    def requests(self, gateway: int, times: int) -> list[Verdict]:
        return [self.request(gateway) for _ in range(times)]

    def request(self, gateway: int, trip_ms: int = 0) -> Verdict:
        """One request of the client; a lease takes ``trip_ms`` to the counter and as long back."""
        account = self.accounts[gateway]
        verdict, decided_ms = account.take(self.clock_ms(gateway)), self.server_ms
        if verdict is None:
            requested_ms, request = self.clock_ms(gateway), account.request()
            self.server_ms += trip_ms
            lease, decided_ms = self.counter.lease(request, self.server_ms), self.server_ms
            self.leases += 1
            self.server_ms += trip_ms
            verdict = account.accept(lease, requested_ms)
        self._check(verdict, decided_ms)
        return verdict

    def _check(self, verdict: Verdict, decided_ms: int) -> None:
        assert verdict.reset_seconds == decided_ms // 1000 // PERIOD_SECONDS * PERIOD_SECONDS + PERIOD_SECONDS
        admitted_ms = self.admitted_ms.setdefault(verdict.reset_seconds, [])
        if verdict.admitted:
            admitted_ms.append(decided_ms)
        assert len(admitted_ms) <= self.limit
        admitted_a_lease_ago = sum(moment_ms < decided_ms - LEASE_MS for moment_ms in admitted_ms)
        assert 0 <= verdict.remaining <= self.limit - admitted_a_lease_ago - verdict.admitted

    def lose_request(self, gateway: int) -> None:
        """A request for a lease without a reply; it may reach the counter later."""
        self.late.append(self.accounts[gateway].request())

    def give_back(self, gateway: int, *, is_late: bool = False) -> None:
        request = self.accounts[gateway].request(wants_permits=False)
        if is_late:
            self.late.append(request)
        else:
            self.counter.lease(request, self.server_ms)

    def forget(self, gateway: int) -> None:
        self.give_back(gateway)
        self.accounts[gateway] = Account(self.policy)

    def kill(self, gateway: int) -> None:
        self.accounts[gateway] = Account(self.policy)

    def arrive(self) -> None:
        """What was late reaches the counter."""
        for request in self.late:
            self.counter.lease(request, self.server_ms)
        self.late.clear()

    @property
    def admitted(self) -> int:
        return sum(map(len, self.admitted_ms.values()))


STEPS = st.one_of(
    st.tuples(st.just("request"), st.integers(0, 2), st.sampled_from([0, 0, 1, 7, 40]), st.sampled_from([1, 3, 120])),
    st.tuples(st.just("near_the_end"), st.just(0), st.integers(-15, 15), st.just(0)),
    st.tuples(st.just("pass"), st.just(0), st.integers(1, 2500), st.just(0)),
    st.tuples(
        st.sampled_from(["lose_request", "give_back", "give_back_late", "forget", "kill", "arrive"]),
        st.integers(0, 2),
        *[st.just(0)] * 2,
    ),
)


@given(
    limit=st.sampled_from([1, 5, 40, 100, 200]),
    ahead_ms=st.lists(st.integers(-(10**7), 10**7), min_size=3, max_size=3),
    steps=st.lists(STEPS, max_size=40),
)
@settings(max_examples=examples(400), deadline=None)
def test_no_interleaving_admits_more_than_the_limit_or_tells_a_remaining_that_is_older_than_a_lease(
    limit: int, ahead_ms: list[int], steps: list[tuple[str, int, int, int]]
) -> None:
    """Also with replies that are lost, requests that arrive late, and gateways that are killed."""
    world = World(limit, ahead_ms)
    for step, gateway, amount_ms, times in steps:
        match step:
            case "request":
                for _ in range(times):
                    world.request(gateway, amount_ms)
            case "near_the_end":
                world.server_ms = max(world.server_ms, world.server_ms // LEASE_MS * LEASE_MS + LEASE_MS + amount_ms)
            case "pass":
                world.server_ms += amount_ms
            case "lose_request":
                world.lose_request(gateway)
            case "give_back" | "give_back_late":
                world.give_back(gateway, is_late=step == "give_back_late")
            case "forget":
                world.forget(gateway)
            case "kill":
                world.kill(gateway)
            case _:
                world.arrive()


def test_a_gateway_alone_counts_down_by_one_and_admits_the_limit() -> None:
    verdicts = World(100, [0]).requests(0, 103)
    assert [verdict.remaining for verdict in verdicts] == [*range(99, -1, -1), 0, 0, 0]
    assert [verdict.admitted for verdict in verdicts] == [True] * 100 + [False] * 3


def test_leases_are_rare() -> None:
    world = World(1000, [0])
    world.requests(0, 1000)
    assert world.leases < 120


def test_a_new_window_begins_with_the_whole_limit() -> None:
    world = World(100, [0])
    world.requests(0, 101)
    world.server_ms += PERIOD_SECONDS * 1000
    verdict = world.request(0)
    assert (verdict.admitted, verdict.remaining, verdict.resets_in_seconds) == (True, 99, PERIOD_SECONDS)


def test_remaining_rises_by_what_another_gateway_gives_back() -> None:
    world = World(100, [0, 5000])
    assert [world.request(gateway).remaining for gateway in (0, 1)] == [99, 93]
    world.give_back(0)
    world.server_ms += LEASE_MS
    assert world.request(1).remaining == 97


def test_what_is_given_back_is_admitted_elsewhere() -> None:
    world = World(32, [0, 5000])
    world.request(0)
    assert sum(verdict.admitted for verdict in world.requests(1, 40)) == 30
    world.server_ms += LEASE_MS
    world.give_back(0)
    assert sum(verdict.admitted for verdict in world.requests(1, 40)) == 1


def test_a_killed_gateway_costs_its_lease_until_the_window_ends() -> None:
    world = World(100, [0, 0])
    world.request(0)
    world.kill(0)
    assert sum(verdict.admitted for verdict in world.requests(1, 110)) == 100 - 100 // 16
    world.server_ms += PERIOD_SECONDS * 1000
    assert sum(verdict.admitted for verdict in world.requests(1, 110)) == 100


def test_a_gateway_knows_a_refusal_for_as_long_as_its_lease() -> None:
    world = World(1, [0])
    account = world.accounts[0]
    assert account.refusal(world.clock_ms(0)) is None
    world.requests(0, 2)
    refusal = account.refusal(world.clock_ms(0))
    assert refusal is not None
    assert not refusal.admitted
    assert account.refusal(world.clock_ms(0) + LEASE_MS) is None


def test_without_the_counter_a_gateway_admits_its_part() -> None:
    account = Account(Policy("p", 100, 60))
    verdicts = [account.take_unleased(START_MS, 3) for _ in range(40)]
    assert sum(verdict.admitted for verdict in verdicts) == 33
    assert [verdict.remaining for verdict in verdicts] == [*range(32, -1, -1)] + [0] * 7
    assert all(verdict.is_local for verdict in verdicts)
    assert account.take_unleased(START_MS + 60_000, 3).admitted


def test_without_the_counter_at_least_one_request_is_admitted() -> None:
    account = Account(Policy("p", 2, 60))
    assert [account.take_unleased(START_MS, 5).admitted for _ in range(2)] == [True, False]


def test_what_was_admitted_without_the_counter_counts_once_it_is_back() -> None:
    world = World(100, [0])
    world.requests(0, 10)
    assert sum(world.accounts[0].take_unleased(world.server_ms, 2).admitted for _ in range(60)) == 40
    world.server_ms += LEASE_MS
    assert world.request(0).remaining == 49


def test_a_permit_is_not_spent_when_its_window_may_be_over() -> None:
    """The reply took 40 ms, of which nobody knows how much was the way back."""
    policy = Policy("p", 100, 60)
    account, counter = Account(policy), Counter(policy)
    end_ms = START_MS - START_MS % 60_000 + 60_000
    assert account.accept(counter.lease(account.request(), end_ms - 50), requested_ms=1000).admitted
    assert account.take(1045) is not None
    assert account.take(1050) is None


def test_what_is_given_back_late_does_not_return_permits_that_are_in_use() -> None:
    world = World(100, [0, 0])
    world.request(0)
    world.give_back(0, is_late=True)
    world.request(0)
    world.arrive()
    world.requests(1, 150)
    world.requests(0, 20)
    assert world.admitted == 100


def test_what_a_forgotten_account_spent_still_counts() -> None:
    world = World(100, [0])
    world.requests(0, 60)
    world.forget(0)
    assert sum(verdict.admitted for verdict in world.requests(0, 60)) == 40
