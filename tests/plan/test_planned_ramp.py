"""A ramp is planned at the batch size that needs most memory, and its tokens are all counted."""

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
# 8 rows a microbatch, then 16, then 8 again. Rows have 32 tokens.
SIZES = ("--config.train.batch_ramp=((600,16,1),(2000,64,8))", "--config.train.steps=9")


def plan(*flags, compile_step=None, search=0):
    config = config_file.load_config(TINY, list(flags))
    line = CommandLine(TINY, list(flags), config)
    request = Request(config, MACHINE, [], line, search=search)
    return make_plan(request, compile_step)


def test_the_size_that_needs_most_memory_is_planned():
    ramp = plan(*SIZES)
    alone = plan("--config.train.batch_size=16", "--config.train.steps=9")
    assert ramp.best.estimate == alone.best.estimate and not ramp.problems
    assert "3 batch sizes" in write_lines(ramp)[0] and "16 rows in 1 microb" in write_lines(ramp)[0]
    # 3 x 8, 3 x 16 and 3 x 64 rows.
    assert ramp.horizon.tokens == 32 * 3 * (8 + 16 + 64)
    assert ramp.horizon.days == pytest.approx(alone.horizon.days * (8 + 16 + 64) / 48)


def test_the_compiler_gets_that_size_alone():
    given = []

    def compile_step(changes):
        given.append(config_file.load_config(TINY, [*SIZES, *changes]).train)
        return {"seconds": 0, "peak": 0, "refusal": "no"}

    plan(*SIZES, compile_step=compile_step)
    assert [(one.batch_size, one.accumulate, one.batch_ramp) for one in given] == [(16, 1, ())]


def test_every_size_is_checked():
    bad = plan("--config.train.batch_ramp=((600,16,1),(2000,12,1))")
    assert bad.problems[0].startswith("config.train.batch_ramp[1] = (2000, 12, 1): gives 12 rows")
    with pytest.raises(UsageError, match=r"batch_ramp = .*: --search takes one batch size"):
        plan(*SIZES, search=1)


def test_what_would_fit_is_a_ramp():
    """The offer changes the microbatches of the sizes that do not fit, and they fit with it."""
    asked = ["--config.train.batch_size=512", "--config.train.batch_ramp=((600_000_000,4096,1),)"]

    def plan_big(flags):
        config = config_file.load_config("configs/modern.py:d12", flags)
        return make_plan(Request(config, MACHINE, [], CommandLine("", flags, config)))

    first = plan_big(asked)
    assert first.problems and first.advice and first.advice.offers
    for offer in first.advice.offers:
        flags = list_overrides(first.base, offer.config)
        assert not plan_big([*asked, *flags]).problems, flags
    line = next(line for line in write_lines(first) if "would fit" in line)
    assert "'--config.train.batch_ramp=((600000000, 4096, 16),)'" in line, line
