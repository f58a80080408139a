"""Rows of every packing equal those of a slow loop."""

import numpy as np
import pytest
from token_arrays import BYTES, make_tokens, slow_row

from gpt_jax import config
from gpt_jax.data.stream import batches as pipeline
from gpt_jax.data.stream.rows import PACKINGS, InOrder, make_columns, spans


def ids_of(tokens):
    return tokens.ids(0, tokens.size)


@pytest.mark.parametrize("sizes", [[5, 1, 1, 30, 2, 8], [40], [1] * 30, [16, 15, 17, 3]])
@pytest.mark.parametrize("seq_len", [1, 4, 16])
@pytest.mark.parametrize("kind", list(PACKINGS))
@pytest.mark.parametrize("document_mask", [False, True])
def test_rows_against_a_loop(kind, sizes, seq_len, document_mask):
    tokens = make_tokens(sizes)
    rows = PACKINGS[kind](tokens, seq_len, 0)
    got = make_columns(rows.fill(np.arange(rows.count)), BYTES.token_bytes, document_mask)
    for i in range(rows.count):
        for name, column in slow_row(tokens, rows.spans(i), seq_len, document_mask).items():
            assert got[name][i].tolist() == column, (name, i)
    held = InOrder(tokens, seq_len)
    evals = make_columns(held.fill(np.arange(held.count + 2)), BYTES.token_bytes, document_mask)
    for i in range(held.count + 2):
        start = i * seq_len
        inside = list(
            spans(
                tokens,
                [(start, max(0, min(seq_len + 1, tokens.size - start)))]
                if start < tokens.size
                else [],
            )
        )
        for name, column in slow_row(tokens, inside, seq_len, document_mask).items():
            assert evals[name][i].tolist() == column, (name, i)
    assert {got[name].dtype for name in got} == {np.dtype(np.int32), np.dtype(np.float32)}
    assert got["weight"].dtype == np.float32


@pytest.mark.parametrize("seq_len", [1, 5, 8, 200])
@pytest.mark.parametrize("document_mask", [False, True])
def test_held_out_text_is_counted_once(document_mask, seq_len):
    tokens, data = make_tokens([20, 7, 33]), config.Data(document_mask=document_mask)
    batches = pipeline.make_eval_batches(tokens, BYTES, data, seq_len, 4, slice(0, 4))
    got = list(batches)
    assert len(got) == len(batches)
    seen = np.concatenate([b["targets"][b["weight"] > 0] for b in got]).tolist()
    starts = set(tokens.offsets.tolist()) if document_mask else {0}
    assert seen == [int(t) for i, t in enumerate(ids_of(tokens)) if i not in starts]
    assert sum(b["bytes"].sum() for b in got) == sum(t < 256 for t in seen)
    # The batches are the same when they are iterated again.
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(got, batches, strict=True))
    halves = [
        list(pipeline.make_eval_batches(tokens, BYTES, data, seq_len, 4, slice(i, i + 2)))
        for i in (0, 2)
    ]
    for whole, *parts in zip(got, *halves, strict=True):
        assert all((np.concatenate([p[k] for p in parts]) == whole[k]).all() for k in whole)
    assert (
        len(pipeline.make_eval_batches(tokens, BYTES, data, seq_len, 4, slice(0, 4), limit=1)) == 1
    )
