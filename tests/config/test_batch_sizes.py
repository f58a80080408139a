"""The map from updates to examples: a slow loop, other ways to a step, and what is no ramp."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from gpt_jax import config
from gpt_jax.config.batch_sizes import Level
from gpt_jax.errors import UsageError

ROW = 10  # tokens
RAMP = ((95, 4, 1), (300, 7, 1), (1000, 2, 1))
TRAIN = config.Train(batch_size=3, seq_len=ROW, batch_ramp=RAMP)
STEPS = 40


def count_slowly(train, steps):
    """The rows of each update, one after the other."""
    examples = 0
    rows = []
    for _ in range(steps):
        size = train.batch_size
        for token, later, _ in train.batch_ramp:
            if examples * train.seq_len >= token:
                size = later
        rows.append(size)
        examples += size
    return rows


def rows_of(sizes, steps=STEPS):
    return [sizes.size(step) for step in range(steps)]


@pytest.mark.parametrize(
    "ramp", [(), RAMP, ((1, 8, 1),), ((30, 6, 1),), ((31, 6, 1),), ((29, 6, 1), (90, 6, 1))]
)
def test_the_map_is_a_loop_over_updates(ramp):
    train = replace(TRAIN, batch_ramp=ramp)
    sizes = config.make_batch_sizes(train)
    rows = count_slowly(train, STEPS)
    assert rows_of(sizes) == rows
    assert [sizes.examples(n) for n in range(STEPS + 1)] == [0, *itertools.accumulate(rows)]


def test_every_size_begins_with_the_first_update_at_or_after_its_token():
    assert config.make_batch_sizes(TRAIN).levels == (
        Level(0, 0, 3),
        Level(4, 12, 4),
        Level(9, 32, 7),
        Level(19, 102, 2),
    )


def test_far_steps_cost_nothing():
    sizes = config.make_batch_sizes(TRAIN)
    assert sizes.examples(10**15) == 102 + 2 * (10**15 - 19) and sizes.size(10**15) == 2


@pytest.mark.parametrize("step", range(25))
def test_the_sizes_of_the_rest(step):
    sizes = config.make_batch_sizes(TRAIN)
    assert sizes.shapes_from(step) == {(size, 1) for size in rows_of(sizes)[step:]}


@pytest.mark.parametrize("stop", range(25))
def test_a_run_that_goes_on_has_the_sizes_of_one_that_never_stopped(stop):
    whole = config.make_batch_sizes(TRAIN)
    past = config.read_batch_sizes(whole.pairs(stop) or [(0, 3)])
    assert config.make_batch_sizes(TRAIN, past, stop) == whole


@pytest.mark.parametrize("stop", range(25))
def test_another_config_counts_from_where_the_run_stopped(stop):
    """What was read stays read, and the next update begins with the next example."""
    whole = config.make_batch_sizes(TRAIN)
    other = replace(TRAIN, batch_size=5, batch_ramp=((200, 6, 1),))
    sizes = config.make_batch_sizes(other, whole, stop)
    assert rows_of(sizes, stop) == rows_of(whole, stop)
    examples = sizes.examples(stop)
    assert examples == whole.examples(stop)
    for step in range(stop, STEPS):
        assert sizes.size(step) == (6 if examples * ROW >= 200 else 5)
        assert sizes.examples(step) == examples
        examples += sizes.size(step)

    # A third start knows both times.
    again = config.read_batch_sizes(sizes.pairs(30))
    assert config.make_batch_sizes(other, again, 30) == sizes


@pytest.mark.parametrize(
    "pairs", [[], [(1, 4)], [(0, 0)], [(0, 4), (0, 5)], [(0, 4), (9, 5), (8, 4)]]
)
def test_pairs_that_are_no_run(pairs):
    with pytest.raises(ValueError, match="no batch sizes"):
        config.read_batch_sizes(pairs)


def test_a_size_has_its_own_microbatches():
    train = config.Train(batch_size=8, accumulate=2, batch_ramp=((4096, 32, 4), (9999, 64, 1)))
    levels = [(one.batch_size, one.accumulate) for one in config.list_levels(train)]
    assert levels == [(8, 2), (32, 4), (64, 1)]
    with pytest.raises(
        ValueError, match=r"12 rows of .*, and the config has .* \[8, 32, 64\] rows"
    ):
        config.at_shape(train, 12, train.seq_len)
    assert all(one.batch_ramp == () for one in config.list_levels(train))


@pytest.mark.parametrize(
    "ramp, words",
    [
        (((0, 16, 1),), ("batch_ramp[0] = (0, 16, 1)", "begins at token 0", "expected 1 to")),
        (((900, 16, 1), (900, 32, 1)), ("batch_ramp[1]", "expected 901 to")),
        (((10**19, 16, 1),), ("batch_ramp[0]", "expected 1 to")),
        (((900, 0, 1),), ("batch_ramp[0] = (900, 0, 1)", "at least 1 row")),
        (((900, 16, 0),), ("batch_ramp[0] = (900, 16, 0)", "at least 1 row")),
        (((900, 10**30, 1),), ("batch_ramp[0]", "at most 2,147,483,647 rows")),
        (((900, 8, 2),), ("batch_ramp[0]", "has 2 microbatches, and the same batch size has 1")),
        (((900, 16, 3),), ("batch_ramp[0]", "divisible by the entry's accumulate = 3")),
        (((5000, 16, 1), (5001, 32, 1)), ("batch_ramp[1]", "has no update; start this one later")),
        (((900, 16),), ("batch_ramp[0] = (900, 16)", "expected 3 entries")),
    ],
)
def test_what_is_no_ramp_is_one_line(ramp, words):
    with pytest.raises(UsageError) as refused:
        config.check(config.resolve(config.from_dict(dict(train=dict(batch_ramp=ramp))), 256))
    lines = str(refused.value).splitlines()
    assert len(lines) == 1 and lines[0].startswith("config.train.batch_ramp[")
    assert all(word in lines[0] for word in words), lines


def test_every_size_divides_over_the_mesh():
    values = dict(train=dict(batch_ramp=((4096, 12, 1), (9999, 32, 2))), mesh=dict(data=8))
    with pytest.raises(UsageError) as refused:
        config.check(config.resolve(config.from_dict(values), 256), 8)
    (line,) = str(refused.value).splitlines()
    assert "config.train.batch_ramp[0] = (4096, 12, 1): gives 12 rows a microbatch" in line
    assert "expert = 8 of the mesh; try 16; if the run is past this size, leave out the" in line


def test_sizes_that_are_past_have_a_way_to_a_larger_mesh():
    train = dict(batch_size=8, batch_ramp=((600, 32, 1),))
    values = dict(train=train, eval=dict(batch_size=32), mesh=dict(data=32))
    with pytest.raises(UsageError) as refused:
        config.check(config.resolve(config.from_dict(values), 256), 32)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("config.train.batch_size = 8: gives 8 rows")
    assert line.endswith(
        "; if the run is past this size, leave out the entries of config.train.batch_ramp that "
        "have begun, and set config.train.batch_size and config.train.accumulate to the last of "
        "them"
    )
    values["train"] = dict(batch_size=32)
    config.check(config.resolve(config.from_dict(values), 256), 32)


def test_every_size_fills_the_stages_of_a_pipeline():
    values = dict(
        model=dict(layers=4),
        train=dict(batch_ramp=((4096, 24, 2),)),
        mesh=dict(pipeline=4, data=1),
        compute=dict(pipeline_microbatches=8),
    )
    with pytest.raises(UsageError, match=r"batch_ramp\[0\] = .*: gives 12 rows at a time"):
        config.check(config.resolve(config.from_dict(values), 256), 4)


def test_random_ramps_are_loops_too():
    draw = np.random.default_rng(0)
    for _ in range(50):
        tokens = np.sort(draw.choice(np.arange(1, 900), 4, replace=False)).tolist()
        ramp = tuple((token, int(draw.integers(1, 9)), 1) for token in tokens)
        train = replace(TRAIN, batch_size=int(draw.integers(1, 9)), batch_ramp=ramp)
        assert rows_of(config.make_batch_sizes(train)) == count_slowly(train, STEPS)
