"""The shared counter of rate limits, said once more in plain Python: what its update pipeline is held to."""

from dataclasses import dataclass, field

from services.gateway.counters import LENT_PART
from services.gateway.permits import SLOT_MS, Ask, Policy, Told


@dataclass
class Holder:
    number: int
    spent: int = 0
    held: int = 0
    waits: bool = False


@dataclass
class Counter:
    """One policy and subject."""

    policy: Policy
    window_ms: int = -1
    slot_ms: int = 0
    taken: int = 0
    spent: int = 0
    low: int = 0
    floor: int = 0
    shown: int = 0
    sole: str | None = None
    contested: bool = False
    holders: dict[str, Holder] = field(default_factory=dict)

    def ask(self, holder: str, ask: Ask, server_ms: int) -> Told | None:
        """The answer; None when the ask comes too late to count."""
        limit = self.policy.limit
        now_ms = max(server_ms, self.slot_ms)
        window_ms = now_ms - now_ms % self.policy.period_ms
        if holder in self.holders and self.holders[holder].number >= ask.number:
            return None
        if window_ms != self.window_ms:
            self.__init__(self.policy, window_ms, low=limit, floor=limit, shown=limit)  # type: ignore[misc]
        mine = self._account(holder, ask)
        if ask.wants:
            self._lend(holder, mine, ask, now_ms)
        return Told(
            now_ms=now_ms,
            window_ms=self.window_ms,
            slot_ms=self.slot_ms,
            is_sole=self.sole == holder,
            must_wait=mine.waits,
            spent_by_all=self.spent,
            spent=mine.spent,
            held=mine.held,
            low=self.low,
            shown=self.shown,
        )

    def _account(self, holder: str, ask: Ask) -> Holder:
        is_about_now = ask.window_ms == self.window_ms
        was = self.holders.get(holder, Holder(0))
        mine = Holder(ask.number, max(was.spent, ask.spent if is_about_now else 0), ask.held if is_about_now else 0)
        self.holders[holder] = mine
        self.spent += mine.spent - was.spent
        self.taken += mine.spent + mine.held - was.spent - was.held
        if is_about_now:
            self.low = min(self.low, ask.told)
        if self.sole == holder:
            self.floor = self.policy.limit
        return mine

    def _lend(self, holder: str, mine: Holder, ask: Ask, now_ms: int) -> None:
        limit, slot_ms = self.policy.limit, now_ms - now_ms % SLOT_MS
        is_first, is_anothers = self.slot_ms < slot_ms, self.sole not in (None, holder)
        mine.waits = not is_first and is_anothers
        if mine.waits:
            self.contested = True
            return
        if is_first:
            if is_anothers:
                self.low = min(self.low, self.floor)
            self.sole = holder if ask.alone and not self.contested else None
            self.slot_ms = slot_ms
        if mine.held == 0:
            left = limit - self.taken
            mine.held = max(0, min(left, max(1, left // LENT_PART)))
            self.taken += mine.held
        if mine.held == 0:
            if is_first:
                self.shown = 0
            self.low = 0
        else:
            if is_first:
                self.shown = max(0, min(self.low, limit - self.spent - 1))
            if self.sole is None:
                self.low = min(self.low, self.shown)
        if self.sole == holder:
            self.floor = max(0, min(self.low, limit - self.spent - mine.held))
