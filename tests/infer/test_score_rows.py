"""Continuations that share the row of their context have the scores that they have alone."""

import numpy as np
import pytest
import test_score
from test_score import EXPERTS, MODERN, make_model, run

from gpt_jax import config
from gpt_jax.infer.prefixes import make_groups
from gpt_jax.infer.requests import Request, fit_request
from gpt_jax.infer.score_batches import make_batches
from gpt_jax.infer.score_rows import group_by_context, make_rows
from gpt_jax.model.attention.kernels import KERNELS, choose_kernel, make_problem

# A recent recipe without what looks at places of the row.
SHARED = {key: value for key, value in MODERN.items() if key not in ("windows", "smear")}
# What is asked: the ids of a context, and the ids of each continuation.
ASKED = ((20, (1, 1, 1, 1)), (11, (4, 1, 7)), (30, (9, 2, 3, 30)), (1, (2, 3)), (47, (2, 1)))


def draw(model, asked=ASKED) -> list[Request]:
    rng = np.random.default_rng(5)
    requests = []
    for size, continuations in asked:
        context = rng.integers(0, model.vocab, size)
        requests += [Request(context, rng.integers(0, model.vocab, n)) for n in continuations]
    return requests


def fit(model, requests):
    return [fit_request("request", one, model.max_seq, model.vocab) for one in requests]


def list_rows(model, requests):
    fitted = fit(model, requests)
    return make_rows(fitted, group_by_context(fitted, model), model.max_seq)


def count_rows(model, requests) -> int:
    return len(list_rows(model, requests))


def first_batch(model, requests):
    return next(make_batches(make_groups(fit(model, requests), model, 1, True), model, 1))


def compare_with_alone(model, compute):
    requests = draw(model)
    for request, found in zip(requests, run(model, requests, compute, list), strict=True):
        (alone,) = run(model, [request], compute, list)
        np.testing.assert_allclose(found.logprobs, alone.logprobs, rtol=0, atol=1e-5)
        assert found.is_greedy == alone.is_greedy and found.cut == alone.cut


@pytest.mark.parametrize(
    "changes",
    [{}, SHARED, EXPERTS | {"position": "sinusoidal"}, {"position": "none"}],
    ids=["learned", "modern", "experts", "none"],
)
def test_together_as_alone(changes):
    model = make_model(**changes)
    assert count_rows(model, draw(model)) < len(draw(model))
    compare_with_alone(model, test_score.COMPUTE)


@pytest.mark.parametrize("kernel", ["blocked", "xla"])
def test_kernels_with_common_keys(kernel):
    compare_with_alone(make_model(position="rotary"), config.Compute(kernel=kernel))


@pytest.mark.parametrize("kernel", ["ring", "splash"])
def test_kernels_without_them_say_so(kernel):
    model = make_model(head_dim=128)
    platform = KERNELS[kernel].platform
    problem = make_problem(model, "float32", 128, platform, common=True)
    assert not KERNELS[kernel].cannot(problem._replace(common=False))
    assert KERNELS[kernel].cannot(problem) == "has no keys in common to segments"
    assert choose_kernel("auto", problem)[0] not in ("ring", "splash")


@pytest.mark.parametrize("changes", [{"windows": (5, 0)}, {"smear": True, "smear_gate": 5}])
def test_models_that_look_at_places_share_no_row(changes):
    model = make_model(**changes)
    assert count_rows(model, draw(model)) == len(draw(model))


def test_a_row_reads_the_context_once():
    """By hand: 3 ids of context, and continuations of 3, 1 and 2 ids."""
    model = make_model()
    context = [7, 8, 9]
    requests = [Request(context, ids) for ids in ([1, 2, 3], [4], [5, 6])]
    (row,) = list_rows(model, requests)
    assert row.numbers == [0, 1, 2]
    assert row.tokens.tolist() == [7, 8, 9, 1, 2, 5]
    assert row.segment.tolist() == [1, 1, 1, 2, 2, 4]
    assert row.position.tolist() == [0, 1, 2, 3, 4, 3]
    assert row.targets.tolist() == [1, 2, 3, 4, 5, 6]
    assert row.places.tolist() == [2, 3, 4, 2, 2, 5]


def test_rows_are_shared_where_this_saves_tokens():
    model = make_model()
    # 24 + 8 read tokens fit the bucket of 32, and one more continuation of 9 would need 48.
    assert count_rows(model, draw(model, [(24, (5, 5))])) == 1
    assert count_rows(model, draw(model, [(24, (5, 5, 5, 5))])) == 1
    # Alone each needs 16 places. Together the two would need 32.
    assert count_rows(model, draw(model, [(4, (11, 11))])) == 2
    # The context of 48 is full.
    assert count_rows(model, draw(model, [(40, (9, 9))])) == 2
    # A context that was cut is another for each continuation.
    assert count_rows(model, draw(model, [(48, (2, 3))])) == 2


def test_a_batch_without_shared_rows_is_plain():
    model = make_model()
    plain = first_batch(model, draw(model, [(20, (3,)), (21, (4,))]))
    assert sorted(plain.columns) == ["segment", "tokens"] and plain.columns["segment"].max() == 1
    shared = first_batch(model, draw(model, [(20, (3, 4))]))
    assert sorted(shared.columns) == ["common", "position", "segment", "tokens"]
