"""The map from updates to rows: a slow loop, other ways to a step, and what is no ramp."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from gpt_jax import config
from gpt_jax.config.batch_sizes import Level
from gpt_jax.errors import UsageError

ROW = 12  # tokens
SIZES = ((95, 4, 2), (300, 7, 1), (1000, 2, 1))
LENGTHS = ((0, 3), (95, 6), (200, 4), (310, 12), (700, 2))
TRAIN = config.Train(batch_size=3, seq_len=ROW, batch_ramp=SIZES, length_ramp=LENGTHS)
STEPS = 40


def count_slowly(train, steps):
    """(examples, pieces of each) of each update, one after the other."""
    examples = 0
    shapes = []
    for _ in range(steps):
        size = train.batch_size
        length = train.seq_len
        for token, later, _ in train.batch_ramp:
            if examples * train.seq_len >= token:
                size = later
        for token, later in train.length_ramp:
            if examples * train.seq_len >= token:
                length = later
        shapes.append((size, train.seq_len // length))
        examples += size
    return shapes


def shapes_of(sizes, steps=STEPS):
    levels = [sizes.level(step) for step in range(steps)]
    return [(level.size, level.pieces) for level in levels]


def draw_ramps(draw):
    tokens = [np.sort(draw.choice(np.arange(1, 900), 4, replace=False)).tolist() for _ in range(2)]
    sizes = tuple((token, int(draw.integers(1, 9)), 1) for token in tokens[0])
    lengths = tuple((token, int(draw.choice([2, 3, 4, 6, 12]))) for token in tokens[1])
    return replace(
        TRAIN, batch_size=int(draw.integers(1, 9)), batch_ramp=sizes, length_ramp=lengths
    )


def test_both_ramps_are_a_loop_over_updates():
    draw = np.random.default_rng(0)
    for train in (TRAIN, *(draw_ramps(draw) for _ in range(50))):
        sizes = config.make_batch_sizes(train)
        shapes = count_slowly(train, STEPS)
        assert shapes_of(sizes) == shapes
        examples = [0, *itertools.accumulate(size for size, _ in shapes)]
        assert [sizes.examples(n) for n in range(STEPS + 1)] == examples
        for step in range(STEPS):
            assert sizes.shapes_from(step) >= set(shapes[step:])
        for example in range(examples[-1]):
            first = next(n for n, begin in enumerate(examples) if begin >= example)
            assert sizes.find_step(example) == first


def test_lengths_change_no_example():
    """They cut the rows of an update, which has the examples that it has without them."""
    sizes = config.make_batch_sizes(TRAIN)
    plain = config.make_batch_sizes(replace(TRAIN, length_ramp=()))
    assert [sizes.examples(n) for n in range(99)] == [plain.examples(n) for n in range(99)]
    assert sizes.pairs(99) == plain.pairs(99) and plain.cuts(99) == [(0, 1)]
    assert sizes.levels[:3] == (Level(0, 0, 3, 4), Level(3, 9, 4, 2), Level(5, 17, 4, 3))


@pytest.mark.parametrize("stop", range(25))
def test_a_run_that_goes_on_has_the_rows_of_one_that_never_stopped(stop):
    whole = config.make_batch_sizes(TRAIN)
    past = config.read_batch_sizes(whole.pairs(stop) or [(0, 3)], whole.cuts(stop) or [(0, 4)])
    assert config.make_batch_sizes(TRAIN, past, stop) == whole


def test_another_ramp_counts_from_where_the_run_stopped():
    whole = config.make_batch_sizes(TRAIN)
    other = replace(TRAIN, length_ramp=((0, 2), (400, 12)))
    sizes = config.make_batch_sizes(other, whole, 6)
    assert shapes_of(sizes)[:6] == count_slowly(TRAIN, 6)
    assert shapes_of(sizes)[6:] == count_slowly(other, STEPS)[6:]


@pytest.mark.parametrize("cuts", [[], [(1, 4)], [(0, 0)], [(0, 4), (9, 5), (8, 4)]])
def test_cuts_that_are_no_run(cuts):
    with pytest.raises(ValueError, match="no row lengths"):
        config.read_batch_sizes([(0, 4)], cuts)


def test_a_shape_has_its_own_rows_microbatches_and_chunks():
    train = replace(TRAIN, accumulate=3, loss_chunk=12)
    levels = config.list_levels(train)
    assert [(x.batch_size, x.seq_len, x.accumulate, x.loss_chunk) for x in levels] == [
        (12, 3, 3, 3),
        (8, 6, 2, 6),
        (12, 4, 2, 4),
        (21, 4, 1, 4),
        (7, 12, 1, 12),
        (42, 2, 1, 2),
        (12, 2, 1, 2),
    ]
    assert all(not x.batch_ramp and not x.length_ramp for x in levels)
    with pytest.raises(ValueError, match=r"rows of 5 tokens, and the config has \[2, 3, 4, 6, 12"):
        config.at_shape(train, 3, 5)
    with pytest.raises(ValueError, match="a batch of 13 rows of 3 tokens"):
        config.at_shape(train, 13, 3)


def refuse(devices=1, **values):
    with pytest.raises(UsageError) as refused:
        config.check(config.resolve(config.from_dict(values), 256), devices)
    (line,) = str(refused.value).splitlines()
    return line


@pytest.mark.parametrize(
    "train, words",
    [
        (dict(length_ramp=((-1, 64),)), ("[0] = (-1, 64)", "expected 0 to")),
        (dict(length_ramp=((9, 64), (9, 128))), ("[1] = (9, 128)", "expected 10 to", "rising")),
        (dict(length_ramp=((10**19, 64),)), ("[0]", "expected 0 to 1,000,000,000,000,000,000")),
        (dict(length_ramp=((0, 100),)), ("[0]", "rows of 100 tokens", "256, such as 64")),
        (dict(length_ramp=((0, 512),)), ("[0]", "rows of 512 tokens", "256, such as 256")),
        (dict(length_ramp=((0, 1),)), ("[0]", "rows of 1 tokens", "256, such as 2")),
        (dict(length_ramp=((0, 0),)), ("[0]", "rows of 0 tokens", "256, such as 2")),
        (dict(length_ramp=((0, -64),)), ("[0]", "rows of -64 tokens")),
        (dict(length_ramp=((0, 2),), loss_chunk=64), ("[0]", "cuts a row into 128", "= 64,")),
        (dict(length_ramp=((5000, 64), (5001, 128))), ("[1]", "same update, at token 6,144")),
        (dict(length_ramp=((0, 64, 1),)), ("[0] = (0, 64, 1)", "expected 2 entries")),
    ],
)
def test_what_is_no_ramp_is_one_line(train, words):
    line = refuse(train=train)
    assert line.startswith("config.train.length_ramp[") and all(word in line for word in words), (
        line
    )


@pytest.mark.parametrize(
    "devices, values, words",
    [
        (8, dict(mesh=dict(context=8, data=1)), ("rows of 24 tokens", "2 x config.mesh.context")),
        (
            3,
            dict(mesh=dict(context=3, data=1), train=dict(loss_chunk=24)),
            ("cuts the chunks of config.train.loss_chunk = 24 to 4 tokens", "raise the chunk"),
        ),
        (
            2,
            dict(
                mesh=dict(tensor=2, data=1),
                compute=dict(shard_sequence=True),
                train=dict(length_ramp=((0, 9),)),
            ),
            ("rows of 9 tokens", "context x tensor = 2"),
        ),
    ],
)
def test_every_length_lies_over_the_mesh(devices, values, words):
    train = dict(seq_len=144, length_ramp=((0, 24),)) | values.get("train", {})
    model = dict(embed=96, heads=6, vocab=258)
    line = refuse(devices, **{**values, "train": train, "model": model})
    assert line.startswith("config.train.length_ramp[0]") and all(word in line for word in words)


def test_rows_are_divided_over_the_mesh_as_they_are_cut():
    """Two examples make eight rows, one for each device. Whole, they are too few."""
    train = dict(batch_size=2, length_ramp=((0, 64), (9999, 256)), batch_ramp=((9999, 8, 1),))
    values = dict(train=train, eval=dict(batch_size=8), mesh=dict(data=8))
    config.check(config.resolve(config.from_dict(values), 256), 8)
    train["batch_ramp"] = ()
    line = refuse(8, **values)
    assert line.startswith("config.train.batch_size = 2: gives 2 rows a microbatch")
    assert "8 of the mesh, where rows have 256 tokens; try 8" in line
