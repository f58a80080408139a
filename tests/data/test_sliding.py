"""Sliding rows of held-out text: each token is predicted once, with enough of its text before."""

import numpy as np
import pytest
from token_arrays import BYTES, make_tokens

from gpt_jax import config
from gpt_jax.data.stream import batches as pipeline

SIZES = [20, 1, 7, 33]


def read(tokens, seq_len, stride, document_mask=False, batch_size=4):
    data = config.Data(document_mask=document_mask)
    rows = slice(0, batch_size)
    args = tokens, BYTES, data, seq_len, batch_size, rows
    batches = list(pipeline.make_eval_batches(*args, stride=stride))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("seq_len, stride", [(8, 1), (8, 3), (8, 7), (8, 8), (200, 5), (1, 1)])
def test_each_token_is_a_target_once_and_sees_enough(seq_len, stride, document_mask):
    """Against a loop over targets. What a target sees is what its row has before it."""
    tokens = make_tokens(SIZES)
    ids = tokens.ids(0, tokens.size).tolist()
    starts = tokens.offsets[:-1].tolist() if document_mask else [0]
    columns = read(tokens, seq_len, stride, document_mask)
    found = []
    for row, place in zip(*np.nonzero(columns["weight"]), strict=True):
        seen = columns["tokens"][row, : place + 1]
        if document_mask:
            segment = columns["segment"][row]
            seen = seen[segment[: place + 1] == segment[place]]
        found.append((columns["targets"][row, place].item(), seen.tolist()))

    targets = [place for place in range(len(ids)) if place not in starts]
    assert [target for target, _ in found] == [ids[place] for place in targets]
    for place, (_, seen) in zip(targets, found, strict=True):
        begin = max(start for start in starts if start < place)
        assert seen == ids[place - len(seen) : place]
        assert len(seen) >= min(place - begin, seq_len - stride + 1)
        assert len(seen) <= min(place - begin, seq_len)
    bytes_seen = sum(target < 256 for target, _ in found)
    assert columns["bytes"].sum() == bytes_seen


@pytest.mark.parametrize("document_mask", [False, True])
def test_a_stride_of_a_row_is_that_of_today(document_mask):
    """The same columns to the bit."""
    tokens = make_tokens(SIZES)
    plain = read(tokens, 8, 0, document_mask)
    whole = read(tokens, 8, 8, document_mask)
    for name, column in plain.items():
        assert column.tobytes() == whole[name].tobytes()
    half = read(tokens, 8, 4, document_mask)
    assert len(half["tokens"]) > len(plain["tokens"])
    assert half["weight"].sum() == plain["weight"].sum()
