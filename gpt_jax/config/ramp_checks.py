"""What must hold for the batch sizes and the row lengths that change inside a run."""

import itertools
import math

from gpt_jax.config.batch_sizes import make_batch_sizes
from gpt_jax.config.check_list import Checks
from gpt_jax.config.knobs import MOST
from gpt_jax.config.run_fields import Train

# The last token at which an entry may begin. Examples are counted in int64, whose end is near
# 9 x 10**18, and an update that begins at this token still has to fit.
LAST_TOKEN = 10**18


def check_ramps(checks: Checks) -> None:
    """Each batch size and each row length is possible, and is there for at least one update."""
    before = len(checks.lines)
    _check_sizes(checks)
    _check_lengths(checks)

    # Updates can be counted only if all sizes and tokens are possible.
    if len(checks.lines) == before:
        _check_size_steps(checks)
        _check_length_steps(checks)


def _check_sizes(checks: Checks) -> None:
    """The later batch sizes: each is possible."""
    train = checks.config.train
    microbatches = {train.batch_size: train.accumulate}
    last = 0
    for i, (token, size, accumulate) in enumerate(train.batch_ramp):
        path = f"train.batch_ramp[{i}]"
        checks.need(
            last < token <= LAST_TOKEN,
            path,
            f"begins at token {token:,}; expected {last + 1:,} to {LAST_TOKEN:,}, because sizes "
            "are given in rising order of their tokens",
        )
        checks.need(
            size > 0 and accumulate > 0,
            path,
            "expected (token, batch_size, accumulate) with at least 1 row and 1 microbatch",
        )
        checks.need(
            max(size, accumulate) <= MOST,
            path,
            f"expected at most {MOST:,} rows and microbatches",
        )
        known = microbatches.setdefault(size, accumulate)
        checks.need(
            known == accumulate,
            path,
            f"has {accumulate} microbatches, and the same batch size has {known} before; one "
            "batch size has one number of microbatches",
        )
        last = token


def _check_size_steps(checks: Checks) -> None:
    """Each size is there for at least one update before the next one begins."""
    train = checks.config.train
    size = train.batch_size
    example = 0
    for i, (token, next_size, _) in enumerate(train.batch_ramp):
        missing = -(-token // train.seq_len) - example
        checks.need(
            missing > 0,
            f"train.batch_ramp[{i}]",
            f"begins at token {token:,}, and the size before it begins at token "
            f"{example * train.seq_len:,} and so has no update; start this one later",
        )
        example += -(-missing // size) * size
        size = next_size


def _check_lengths(checks: Checks) -> None:
    """The shorter rows: each is a whole part of a row."""
    train = checks.config.train
    last = -1
    for i, (token, length) in enumerate(train.length_ramp):
        path = f"train.length_ramp[{i}]"
        checks.need(
            last < token <= LAST_TOKEN,
            path,
            f"begins at token {token:,}; expected {last + 1:,} to {LAST_TOKEN:,}, because lengths "
            "are given in rising order of their tokens",
        )
        is_part = 2 <= length <= train.seq_len and train.seq_len % length == 0
        checks.need(
            is_part,
            path,
            f"has rows of {length:,} tokens; expected a length of at least 2 that divides "
            f"config.train.seq_len = {train.seq_len:,}, such as {_find_divisor(train, length):,}",
        )
        pieces = train.seq_len // length if is_part else 1
        checks.need(
            train.loss_chunk % pieces == 0,
            path,
            f"cuts a row into {pieces:,}, and that must divide config.train.loss_chunk = "
            f"{train.loss_chunk}, whose chunks are cut as rows are; change one of them",
        )
        last = token


def _find_divisor(train: Train, length: int) -> int:
    """The largest part of a row that is not above `length`, or else the smallest one."""
    small = [n for n in range(1, math.isqrt(train.seq_len) + 1) if train.seq_len % n == 0]
    divisors = {*small, *(train.seq_len // n for n in small)} - {1}
    return max((size for size in divisors if size <= length), default=min(divisors))


def _check_length_steps(checks: Checks) -> None:
    """Each row length is there for at least one update before the next one begins."""
    train = checks.config.train
    sizes = make_batch_sizes(train)
    firsts = [sizes.find_step(-(-token // train.seq_len)) for token, _ in train.length_ramp]
    for i, (first, after) in enumerate(itertools.pairwise(firsts)):
        checks.need(
            first < after,
            f"train.length_ramp[{i + 1}]",
            f"begins at token {train.length_ramp[i + 1][0]:,}, and the length before it begins "
            f"with the same update, at token {sizes.examples(first) * train.seq_len:,}; start this "
            "one later",
        )
