import itertools

import pytest

from gla_ablate.data.order import StepBatches


def first(batches: StepBatches, count: int) -> list[list[int]]:
    return list(itertools.islice(batches, count))


def test_batches_are_the_same_for_the_same_seed():
    assert first(StepBatches(1000, 8, seed=3), 300) == first(StepBatches(1000, 8, seed=3), 300)


def test_batches_differ_between_seeds_and_between_epochs():
    batches = StepBatches(100, 10, seed=0)
    assert first(batches, 10) != first(StepBatches(100, 10, seed=1), 10)
    assert first(batches, 20)[10:] != first(batches, 10)


@pytest.mark.parametrize("start", [0, 1, 12, 13, 14, 40])
def test_starting_at_a_step_goes_on_exactly(start):
    whole = first(StepBatches(107, 8, seed=5), 60)
    assert first(StepBatches(107, 8, seed=5, start_step=start), 60 - start) == whole[start:]


def test_no_row_comes_twice_in_an_epoch_and_only_a_part_of_a_batch_is_left_out():
    batches = StepBatches(107, 8, seed=0)
    for epoch in range(3):
        rows = [row for step in range(13 * epoch, 13 * (epoch + 1)) for row in batches.batch(step)]
        assert len(rows) == len(set(rows)) == 104
        assert set(rows) <= set(range(107))


def test_rows_left_over_change_from_epoch_to_epoch():
    batches = StepBatches(107, 8, seed=0)
    seen = {row for step in range(13 * 4) for row in batches.batch(step)}
    assert seen == set(range(107))


def test_a_batch_can_be_the_whole_of_the_data():
    assert [sorted(batch) for batch in first(StepBatches(4, 4, seed=0), 3)] == [[0, 1, 2, 3]] * 3
