"""The law of rate limits: never over the limit, ``Remaining`` never rises, over any interleaving of gateways."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from services.gateway.permits import SLOT_MS, Account, Ask, Policy, Verdict
from tests.unit.gateway.counter_model import Counter

PERIOD_SECONDS = 4
START_MS = 1_000_000_000_000


@dataclass
class World:
    """Gateways with clocks of their own around one counter; time passes only between steps."""

    limit: int
    ahead_ms: list[int]
    alone: list[bool]
    server_ms: int = START_MS
    last_number: int = 0
    admitted: dict[int, int] = field(default_factory=dict)
    last_said: tuple[int, int] = (0, 0)
    late: list[tuple[int, Ask]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = Policy("p", self.limit, PERIOD_SECONDS)
        self.counter = Counter(self.policy)
        self.accounts = [Account(self.policy) for _ in self.ahead_ms]

    def number(self) -> int:
        self.last_number += 1
        return self.last_number

    def clock_ms(self, gateway: int) -> float:
        return self.server_ms + self.ahead_ms[gateway]

    def request(self, gateway: int, trip_ms: int, *, is_lost: bool) -> None:
        """One request of the client, answered before its next; asking takes ``trip_ms`` there and as long back."""
        account = self.accounts[gateway]
        while (verdict := account.take(self.clock_ms(gateway))) is None:
            asked_ms = self.clock_ms(gateway)
            ask = account.ask(self.number(), alone=self.alone[gateway])
            self.server_ms += trip_ms
            if is_lost:
                # Executed, now or later, without anybody hearing of it; the request is not decided here.
                self.late.append((gateway, ask))
                return
            told = self.counter.ask(str(gateway), ask, self.server_ms)
            decided_ms = self.server_ms
            self.server_ms += trip_ms
            assert told is not None
            wait_ms = account.learn(told, asked_ms)
            if wait_ms is None:
                self.said(account.settle(self.clock_ms(gateway)), decided_ms)
                return
            assert wait_ms <= SLOT_MS
            self.server_ms += wait_ms
        self.said(verdict, self.server_ms)

    def said(self, verdict: Verdict, decided_ms: int) -> None:
        window = verdict.reset_seconds
        assert window == decided_ms // 1000 // PERIOD_SECONDS * PERIOD_SECONDS + PERIOD_SECONDS
        assert 0 <= verdict.remaining < self.limit or not verdict.admitted
        if self.last_said[0] == window:
            assert verdict.remaining <= self.last_said[1]
        self.last_said = window, verdict.remaining
        if verdict.admitted:
            self.admitted[window] = self.admitted.get(window, 0) + 1
            assert self.admitted[window] <= self.limit

    def give_back(self, gateway: int, *, is_lost: bool) -> None:
        account = self.accounts[gateway]
        if account.owes:
            ask = account.give_back(self.number())
            if is_lost:
                self.late.append((gateway, ask))
                return
            self.counter.ask(str(gateway), ask, self.server_ms)
            account.gave_back(ask)

    def forget(self, gateway: int) -> None:
        self.give_back(gateway, is_lost=False)
        if not self.accounts[gateway].owes:
            self.accounts[gateway] = Account(self.policy)

    def arrive(self) -> None:
        """What was thought lost reaches the counter after all."""
        for gateway, ask in self.late:
            self.counter.ask(str(gateway), ask, self.server_ms)
        self.late.clear()


STEPS = st.one_of(
    st.tuples(st.just("request"), st.integers(0, 2), st.sampled_from([0, 0, 1, 7, 40]), st.sampled_from([1, 3, 120])),
    st.tuples(st.just("near_the_end"), st.just(0), st.integers(-15, 15), st.just(0)),
    st.tuples(st.just("lost"), st.integers(0, 2), st.integers(0, 40), st.just(0)),
    st.tuples(st.just("pass"), st.just(0), st.integers(1, 2500), st.just(0)),
    st.tuples(
        st.sampled_from(["give_back", "give_back_lost", "forget", "arrive"]), st.integers(0, 2), *[st.just(0)] * 2
    ),
)


@given(
    limit=st.sampled_from([1, 5, 40, 100, 200]),
    ahead_ms=st.lists(st.integers(-(10**7), 10**7), min_size=3, max_size=3),
    alone=st.lists(st.booleans(), min_size=3, max_size=3),
    steps=st.lists(STEPS, max_size=40),
)
@settings(max_examples=400, deadline=None)
def test_no_interleaving_admits_more_than_the_limit_or_lets_remaining_rise(
    limit: int, ahead_ms: list[int], alone: list[bool], steps: list[tuple[str, int, int, int]]
) -> None:
    """Also with answers that are lost, asks that arrive late, and gateways that wrongly believe to be alone."""
    world = World(limit, ahead_ms, alone)
    for step, gateway, amount_ms, times in steps:
        match step:
            case "request":
                for _ in range(times):
                    world.request(gateway, amount_ms, is_lost=False)
            case "lost":
                world.request(gateway, amount_ms, is_lost=True)
            case "near_the_end":
                world.server_ms = max(world.server_ms, world.server_ms // SLOT_MS * SLOT_MS + SLOT_MS + amount_ms)
            case "pass":
                world.server_ms += amount_ms
            case "give_back" | "give_back_lost":
                world.give_back(gateway, is_lost=step == "give_back_lost")
            case "forget":
                world.forget(gateway)
            case _:
                world.arrive()
    window = world.server_ms // 1000 // PERIOD_SECONDS * PERIOD_SECONDS
    assert world.admitted.get(window, 0) <= limit


def _gateway_alone(limit: int = 100) -> World:
    return World(limit, [0], [True])


def _verdicts(world: World, gateway: int, times: int) -> list[Verdict]:
    found: list[Verdict] = []
    said = world.said

    def keep(verdict: Verdict, decided_ms: int) -> None:
        found.append(verdict)
        said(verdict, decided_ms)

    world.said = keep  # type: ignore[method-assign]
    for _ in range(times):
        world.request(gateway, 0, is_lost=False)
    del world.said
    return found


def test_a_gateway_alone_counts_down_by_one_and_admits_the_limit() -> None:
    verdicts = _verdicts(_gateway_alone(), 0, 103)
    assert [verdict.remaining for verdict in verdicts] == [*range(99, -1, -1), 0, 0, 0]
    assert [verdict.admitted for verdict in verdicts] == [True] * 100 + [False] * 3


def test_asking_is_rare() -> None:
    world = _gateway_alone(1000)
    _verdicts(world, 0, 1000)
    assert world.last_number < 120


def test_a_new_window_begins_with_the_whole_limit() -> None:
    world = _gateway_alone()
    _verdicts(world, 0, 101)
    world.server_ms += PERIOD_SECONDS * 1000
    (verdict,) = _verdicts(world, 0, 1)
    assert (verdict.admitted, verdict.remaining, verdict.resets_in_seconds) == (True, 99, PERIOD_SECONDS)


def test_what_is_given_back_is_admitted_elsewhere() -> None:
    world = World(32, [0, 5000], [False, False])
    _verdicts(world, 0, 1)
    assert sum(verdict.admitted for verdict in _verdicts(world, 1, 40)) == 30
    world.server_ms += SLOT_MS
    world.give_back(0, is_lost=False)
    assert sum(verdict.admitted for verdict in _verdicts(world, 1, 40)) == 1


def test_a_gateway_that_finds_another_alone_waits_once() -> None:
    world = World(100, [0, 0], [True, True])
    _verdicts(world, 0, 5)
    began_ms = world.server_ms
    _verdicts(world, 1, 1)
    assert world.server_ms - began_ms == SLOT_MS
    for gateway in (0, 1, 0, 1):
        _verdicts(world, gateway, 1)
    assert world.server_ms - began_ms == SLOT_MS


def test_without_the_counter_a_gateway_admits_its_part() -> None:
    account = Account(Policy("p", 100, 60))
    verdicts = [account.take_alone(0, START_MS, 3) for _ in range(40)]
    assert sum(verdict.admitted for verdict in verdicts) == 33
    assert [verdict.remaining for verdict in verdicts] == [*range(32, -1, -1)] + [0] * 7
    assert all(verdict.is_local for verdict in verdicts)
    assert account.take_alone(0, START_MS + 60_000, 3).admitted


def test_without_the_counter_at_least_one_request_is_admitted() -> None:
    account = Account(Policy("p", 2, 60))
    assert [account.take_alone(0, START_MS, 5).admitted for _ in range(2)] == [True, False]


def test_a_permit_is_not_spent_when_its_window_may_be_over() -> None:
    """The answer took 40 ms, of which nobody knows how much was the way back."""
    account, policy = Account(Policy("p", 100, 60)), Policy("p", 100, 60)
    end_ms = START_MS - START_MS % 60_000 + 60_000
    told = Counter(policy).ask("a", account.ask(1, alone=True), end_ms - 50)
    assert told is not None
    account.learn(told, asked_ms=1000)
    assert account.settle(1040).admitted
    assert account.take(1045) is not None
    assert account.take(1050) is None


def test_what_is_given_back_late_does_not_return_permits_that_are_in_use() -> None:
    world = World(100, [0, 0], [False, False])
    _verdicts(world, 0, 1)
    world.give_back(0, is_lost=True)
    _verdicts(world, 0, 1)
    world.arrive()
    _verdicts(world, 1, 150)
    _verdicts(world, 0, 20)
    assert sum(world.admitted.values()) == 100


def test_what_a_forgotten_account_spent_still_counts() -> None:
    world = World(100, [0], [False])
    _verdicts(world, 0, 60)
    world.forget(0)
    assert sum(verdict.admitted for verdict in _verdicts(world, 0, 60)) == 40
