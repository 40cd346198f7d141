"""Who goes where, in numbers alone."""

from sslr1.rollout.cache import Shape
from sslr1.rollout.scheduler import Scheduler


def scheduler(lengths, places=3, rows=8, prefill_tokens=100):
    shape = Shape(places=places, longest=max(lengths), group_size=4, max_tokens=6, rows=rows)
    return Scheduler(lengths, shape, prefill_tokens)


def test_prompts_wait_for_rows_and_then_for_a_place():
    s = scheduler([10, 20, 30, 40])
    assert s.admit() == [{0: 0, 1: 1}] and s.live == [4, 4, 0]  # a third place is free, but no rows are
    s.look([1, 3, 0])
    assert s.release() == {} and s.admit() == [{2: 2}]
    s.look([1, 2, 1])
    assert s.admit() == []  # four rows would do; no place is free
    s.look([0, 2, 1])
    assert s.release() == {0: 0} and s.admit() == [{0: 3}] and s.busy
    s.look([0, 0, 0])
    assert s.release() == {0: 3, 1: 1, 2: 2} and s.admit() == [] and not s.busy


def test_a_packed_row_holds_so_many_tokens_and_one_prompt_at_least():
    assert scheduler([60, 40, 1], rows=12).admit() == [{0: 0, 1: 1}, {2: 2}]
    assert scheduler([160, 40], rows=12).admit() == [{0: 0}, {1: 1}]
    assert scheduler([1, 1], rows=12, prefill_tokens=0).admit() == [{0: 0}, {1: 1}]


def test_no_steps_beyond_what_a_group_can_take():
    s = scheduler([1, 1], rows=4)
    s.admit()
    assert [s.advance(2) for _ in range(4)] == [2, 2, 1, 0]  # six tokens, of which the prefill drew one
    s.look([0, 0, 0])
    s.release(), s.admit()
    assert s.advance(8) == 5
