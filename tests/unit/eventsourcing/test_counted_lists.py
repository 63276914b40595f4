"""The arithmetic of counted lists, and how a batch changes them."""

import pytest

from libs.eventsourcing.counted_lists import BLOCK, ERA, counts_id, era_of, increments, locate, number_above
from libs.eventsourcing.list_changes import ListChanges


def test_entities_are_counted_in_their_era_and_block() -> None:
    """The example of the module's docstring, and one entity in the next era."""
    changes = [("errors", 5, 1), ("errors", 2_050, 1), ("errors", 2_051, 1), ("errors", ERA + BLOCK, 1)]
    assert increments(changes) == {
        "errors#0000000": {"n": 3, "b.0": 1, "b.2": 2},
        "errors#0000001": {"n": 1, "b.1": 1},
    }


def test_what_adds_up_to_nothing_is_not_written() -> None:
    """One of two entities of a block is replaced by a third, so the block's count and the total stay as they are."""
    assert increments([("errors", 5, -1), ("errors", 6, 1)]) == {}
    assert increments([("errors", 5, -1), ("errors", 2_050, 1)]) == {"errors#0000000": {"b.0": -1, "b.2": 1}}


@pytest.mark.parametrize(("offset", "bucket", "within"), [(0, "new", 0), (1, "new", 1), (2, "old", 0), (4, "old", 2)])
def test_an_offset_is_located_in_the_bucket_that_contains_it(offset: int, bucket: str, within: int) -> None:
    assert locate([("new", 2), ("empty", 0), ("old", 3)], offset) == (bucket, within)


def test_counts_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(AssertionError, match="do not add up"):
        locate([("only", 2)], 2)


def test_the_era_is_read_from_the_id_whatever_the_lists_name() -> None:
    assert era_of(counts_id('[7,"a#b"]', 12)) == 12
    assert number_above(0, 2) == 3_072
    assert number_above(1, 0) == ERA + 1_024


def test_entities_that_enter_get_provisional_numbers_and_leaving_cancels_the_count() -> None:
    changes = ListChanges()
    first = changes.move((), ("a", "b"), None)
    second = changes.move((), ("a",), None)
    assert (first, second, changes.entering) == (-1, -2, 2)
    assert changes.move(("a", "b"), ("a", "c"), first) == first
    assert changes.move(("a",), (), second) is None
    assert {key: count for key, count in changes.counts.items() if count} == {("a", -1): 1, ("c", -1): 1}
    assert changes.move(("a",), (), 7) is None
    assert changes.counts["a", 7] == -1


def test_a_refused_draft_leaves_no_trace_in_the_numbers() -> None:
    changes = ListChanges()
    changes.move((), ("a",), None)
    draft = changes.draft()
    assert draft.move((), ("a",), None) == -2
    assert changes.entering == 1
    changes.accept(draft)
    assert (changes.entering, changes.counts) == (2, {("a", -1): 1, ("a", -2): 1})
