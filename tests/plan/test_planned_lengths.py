"""A ramp of row lengths is planned at the batch shape that needs most memory."""

import pytest

from gpt_jax.commands import config_file
from gpt_jax.errors import UsageError
from gpt_jax.plan.command_line import CommandLine
from gpt_jax.plan.lines import write_lines
from gpt_jax.plan.plan import Request, make_plan
from gpt_jax.plan.search import list_overrides
from gpt_jax.plan.topology import parse_topology

TINY = "configs/tiny.py"
MACHINE = parse_topology("h100:8", 1)

# Rows of 32 tokens. The batch of 64 has short rows alone.
LENGTHS = "--config.train.length_ramp=((0,8),(600,16),(2000,32))"
SIZES = "--config.train.batch_ramp=((600,64,1),(2000,8,1))"
STEPS = "--config.train.steps=9"


def plan(*flags, compile_step=None, search=0):
    config = config_file.load_config(TINY, list(flags))
    line = CommandLine(TINY, list(flags), config)
    return make_plan(Request(config, MACHINE, [], line, search=search), compile_step)


def test_rows_of_full_length_are_planned_where_tokens_stay():
    ramp = plan(LENGTHS, STEPS)
    alone = plan(STEPS)
    assert ramp.best.estimate == alone.best.estimate and not ramp.problems
    assert "3 batch shapes" in write_lines(ramp)[0]
    assert "8 rows of 32 tokens in 1 microb" in write_lines(ramp)[0]
    assert ramp.horizon.tokens == alone.horizon.tokens == 9 * 8 * 32


def test_short_rows_are_planned_where_there_are_more_of_them():
    ramp = plan(LENGTHS, SIZES, STEPS)
    short = ("--config.train.batch_size=128", "--config.train.seq_len=16")
    alone = plan(*short, "--config.model.max_seq=32", "--config.eval.batch_size=8", STEPS)
    assert ramp.best.estimate == alone.best.estimate and not ramp.problems
    assert "config.train.batch_ramp and config.train.length_ramp: 3" in write_lines(ramp)[0]
    # 3 x 8, 1 x 64 rows and 5 x 8 rows.
    assert ramp.horizon.tokens == 32 * (3 * 8 + 64 + 5 * 8)


def test_the_compiler_gets_that_shape_alone():
    given = []

    def compile_step(changes):
        given.append(config_file.load_config(TINY, [LENGTHS, SIZES, STEPS, *changes]).train)
        return {"seconds": 0, "peak": 0, "refusal": "no"}

    plan(LENGTHS, SIZES, STEPS, compile_step=compile_step)
    (train,) = given
    assert (train.batch_size, train.seq_len) == (128, 16)
    assert train.batch_ramp == () == train.length_ramp


def test_every_length_is_checked():
    mesh = ("--config.mesh.context=8", "--config.mesh.data=1")
    bad = plan("--config.train.length_ramp=((0,8),)", *mesh)
    assert bad.problems[0].startswith("config.train.length_ramp[0] = (0, 8): has rows of 8 tokens")
    with pytest.raises(UsageError, match=r"length_ramp = .*: --search takes one row length"):
        plan(LENGTHS, search=1)


def test_what_would_fit_is_a_ramp():
    """The offer changes the microbatches of all sizes, and all shapes fit with it."""
    asked = [
        "--config.train.batch_size=512",
        "--config.train.batch_ramp=((600_000_000,4096,1),)",
        "--config.train.length_ramp=((0,512),(600_000_000,1024))",
        "--config.train.seq_len=1024",
    ]

    def plan_big(flags):
        config = config_file.load_config("configs/modern.py:d12", flags)
        return make_plan(Request(config, MACHINE, [], CommandLine("", flags, config)))

    first = plan_big(asked)
    assert first.problems and first.advice and first.advice.offers
    for offer in first.advice.offers:
        assert offer.config.train.length_ramp == ((0, 512), (600_000_000, 1024))
        flags = list_overrides(first.base, offer.config)
        assert not plan_big([*asked, *flags]).problems, flags
