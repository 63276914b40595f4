"""Random walks: each test that takes one walks a sample of the ways, or with ``--walk=long`` many more."""

import random
from dataclasses import dataclass

from hypothesis import settings

SAMPLE, LONG = "sample", "long"
EXAMPLES_FACTOR = 20

# How long an example takes says more about the machine than about the code.
settings.register_profile(SAMPLE, deadline=None)
settings.register_profile(LONG, deadline=None, max_examples=EXAMPLES_FACTOR * settings.get_profile(SAMPLE).max_examples)


@dataclass(frozen=True, slots=True)
class Walk:
    """How far a test walks, and by which choices.

    Args:
        seed: of this test; the same seed makes the same choices.
        random: makes the choices.
    """

    is_long: bool
    seed: str
    random: random.Random

    @classmethod
    def of(cls, seed: int, test: str, *, is_long: bool) -> "Walk":
        own_seed = f"{seed}/{test}"
        return cls(is_long, own_seed, random.Random(own_seed))

    def rounds(self, sample: int, long: int) -> int:
        """How many rounds to make."""
        return long if self.is_long else sample


def examples(sample: int) -> int:
    """``max_examples`` of a property test that tries this many in a sample."""
    return sample * EXAMPLES_FACTOR if settings.get_current_profile_name() == LONG else sample
