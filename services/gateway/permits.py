"""The arithmetic of rate limits at one gateway: permits leased from a shared counter and spent here.

A policy admits ``limit`` requests of a subject in each window; windows are fixed and aligned to the epoch by the
store's clock. Windows are cut into slots of a second. What the counter answered (permits, and what ``Remaining`` may be
said) holds until its slot's end, and no clock but the store's decides when that is: a gateway knows from when it asked
how late it can be there at most, so a request is charged to a window only while that window surely lasts.

``Remaining`` never rises within a window, whichever gateways a client's requests meet one after the other. Two gateways
that answer without talking can only keep that promise with one and the same number, so there are two kinds of slots:

- *sole*: one gateway has the slot for itself and counts down by one a request. Whoever else comes waits for the slot's
  end, and every further slot of the window is shared. A gateway asks for sole slots while it knows of no other.
- *shared*: the first to ask in a slot fixes the number for all of it.
"""

import math
from dataclasses import dataclass

SLOT_MS = 1000
DRIFT = 0.001
"""How much faster than ours the store's clock may run; quartz is a hundred times better."""


@dataclass(frozen=True, slots=True)
class Policy:
    """``limit`` requests in each window of ``period_seconds``; the name tells clients and counters which it is."""

    name: str
    limit: int
    period_seconds: int

    @property
    def period_ms(self) -> int:
        return self.period_seconds * 1000


@dataclass(frozen=True, slots=True)
class Ask:
    """What a gateway tells the counter, all absolute, so that an ask may be lost, or repeated, or overtaken.

    Args:
        number: the counter ignores an ask that is not numbered above the last one that it saw from this gateway.
        window_ms: the window that the rest is about, by its beginning.
        spent: requests that this gateway admitted in it.
        held: permits that it keeps for later; those that it does not name go back.
        told: the lowest ``Remaining`` that it has said.
        wants: it needs a permit for a request; else it only gives back.
        alone: it knows of no other gateway.
    """

    number: int
    window_ms: int
    spent: int
    held: int
    told: int
    wants: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """What the counter says to an ask.

    Args:
        now_ms: the store's clock.
        window_ms: the window that this is, by its beginning.
        slot_ms: the slot that ``is_sole`` and ``shown`` are about, by its beginning.
        is_sole: the slot is for this gateway alone.
        must_wait: the slot is another gateway's alone: ask again when it is over.
        spent_by_all: requests admitted, as far as gateways have told.
        spent: those admitted by this gateway.
        held: permits that this gateway now has.
        low: the lowest ``Remaining`` that anybody may have said in earlier slots.
        shown: the ``Remaining`` of a shared slot.
    """

    now_ms: int
    window_ms: int
    slot_ms: int
    is_sole: bool
    must_wait: bool
    spent_by_all: int
    spent: int
    held: int
    low: int
    shown: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one request is admitted, and what its client is told.

    Args:
        reset_seconds: when the window ends, since the epoch.
        resets_in_seconds: the same, from now.
        is_local: decided without the shared counter.
    """

    admitted: bool
    remaining: int
    reset_seconds: int
    resets_in_seconds: int
    is_local: bool = False


class Account:
    """One subject's permits at this gateway under one policy. ``clock_ms`` is monotonic everywhere."""

    __slots__ = (
        "_asked_ms",
        "_low",
        "_now_ms",
        "_refused",
        "_reported",
        "_room",
        "_slot_end_ms",
        "_sole",
        "_window_ms",
        "held",
        "policy",
        "spent",
        "told",
        "used_ms",
    )

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.used_ms = 0.0
        self._now_ms = 0
        self._asked_ms = 0.0
        self._enter(-1)

    def _enter(self, window_ms: int) -> None:
        self._window_ms = window_ms
        self.spent = self._reported = 0
        self.held = 0
        self.told = self._low = self._room = self.policy.limit
        self._slot_end_ms = 0
        self._sole = self._refused = False

    @property
    def owes(self) -> bool:
        """There is something that the counter does not know or that others could use."""
        return self.held > 0 or self.spent != self._reported

    def take(self, clock_ms: float) -> Verdict | None:
        """Decide about a request with what is here; None when the counter has to be asked."""
        now_ms = self._now_ms + (clock_ms - self._asked_ms) * (1 + DRIFT) + 1
        if now_ms >= self._slot_end_ms:
            return None
        self.used_ms = clock_ms
        if self.held > 0:
            return self._spend(now_ms)
        return self._verdict(False, now_ms) if self._refused else None

    def ask(self, number: int, *, alone: bool) -> Ask:
        """The question for one more permit."""
        return Ask(number, self._window_ms, self.spent, self.held, self.told, wants=True, alone=alone)

    def give_back(self, number: int) -> Ask:
        """Let go of all permits; what is told of it may get lost, as the next ask says it again."""
        self.held = 0
        self._refused = False
        return Ask(number, self._window_ms, self.spent, 0, self.told)

    def gave_back(self, ask: Ask) -> None:
        """The counter has heard what was given back."""
        if ask.window_ms == self._window_ms:
            self._reported = max(self._reported, ask.spent)

    def learn(self, told: Told, asked_ms: float) -> int | None:
        """Take in the answer to an ask sent at ``asked_ms``; how long to wait, in milliseconds, if that is its answer.

        Without a wait the ask's own request is to be ``settle``d at once.
        """
        if told.window_ms != self._window_ms:
            self._enter(told.window_ms)
        self._now_ms, self._asked_ms = told.now_ms, asked_ms
        self.spent = self._reported = told.spent
        self.held = told.held
        self._refused = False
        slot_end_ms = told.slot_ms + SLOT_MS
        if told.must_wait:
            self._slot_end_ms = 0
            return max(1, slot_end_ms - told.now_ms)
        self._slot_end_ms = slot_end_ms
        self._sole = told.is_sole
        self._low = told.low if told.is_sole else told.shown
        self._room = self.policy.limit - told.spent_by_all + told.spent
        self._refused = told.held == 0
        return None

    def settle(self, clock_ms: float) -> Verdict:
        """The verdict on the request that the counter was asked for; it counts from the moment of the answer."""
        self.used_ms = clock_ms
        return self._spend(self._now_ms) if self.held > 0 else self._verdict(False, self._now_ms)

    def take_alone(self, clock_ms: float, now_ms: float, gateways: int) -> Verdict:
        """Decide without the counter, by this gateway's part of the limit, at least 1.

        Args:
            now_ms: the best guess at the store's clock.
        """
        window_ms = int(now_ms) - int(now_ms) % self.policy.period_ms
        if window_ms > self._window_ms:
            self._enter(window_ms)
        self.used_ms = clock_ms
        self.held = self._slot_end_ms = 0
        part = max(1, self.policy.limit // gateways)
        admitted = self.spent < part
        self.spent += admitted
        self.told = max(0, min(self.told, part - self.spent))
        return self._verdict(admitted, now_ms, is_local=True)

    def is_over(self, now_ms: float) -> bool:
        """The window that this knows of has ended."""
        return now_ms >= self._window_ms + self.policy.period_ms

    def _spend(self, now_ms: float) -> Verdict:
        self.held -= 1
        self.spent += 1
        return self._verdict(True, now_ms)

    def _verdict(self, admitted: bool, now_ms: float, *, is_local: bool = False) -> Verdict:
        if not is_local:
            self.told = max(0, min(self.told, self._low, self._room - self.spent if self._sole else self._low))
            if not admitted and self._sole:
                self.told = 0
        end_ms = self._window_ms + self.policy.period_ms
        return Verdict(admitted, self.told, end_ms // 1000, max(1, math.ceil((end_ms - now_ms) / 1000)), is_local)
