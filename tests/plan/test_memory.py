"""Activations, logits, buffers of experts and gathered weights, against figures made by hand."""

from dataclasses import replace

import pytest
from plans import ONE, changed, job_of, llama

from gpt_jax import config as configs
from gpt_jax.model.experts.local_experts import choose_block_rows
from gpt_jax.plan import memory
from gpt_jax.plan.experts import count_padding, count_places, count_turns
from gpt_jax.plan.job import compute_bytes
from gpt_jax.plan.memory import estimate_memory
from gpt_jax.plan.microbatch import split_microbatch


def test_activations_of_llama_8b():
    """Under remat `block` a device with one row keeps 32 streams, and the one that comes out.

    A stream is 8,192 x 4,096 in bfloat16.
    """
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    stream = 8192 * 4096 * 2

    def count_activations(job, **axes):
        return estimate_memory(job, ONE | axes, "splash", "tpu").activations

    assert count_activations(job, fsdp=64) == 33 * stream
    assert count_activations(job, fsdp=32, context=2) == 33 * stream
    cut = changed(job, compute=dict(shard_sequence=True))
    assert count_activations(cut, fsdp=16, tensor=4) == 4 * 33 * stream / 4


def test_logits_of_llama_8b():
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    chunked = estimate_memory(job, ONE | {"fsdp": 64}, "splash", "tpu")
    assert chunked.logits == 2 * 1024 * 128_256 * 4

    job = changed(job, train=dict(loss_chunk=0))
    whole = estimate_memory(job, ONE | {"fsdp": 8, "tensor": 8}, "splash", "tpu")
    assert whole.logits == 2 * 8 * 8192 * 128_256 / 8 * 4


def test_what_remat_keeps_is_ordered():
    block, dots, none = (
        estimate_memory(
            changed(llama(), compute=dict(remat=remat)), ONE | {"fsdp": 64}, "splash", "tpu"
        ).activations
        for remat in ("block", "dots", "none")
    )
    assert block * 3 < dots < none


def test_a_pipeline_ticks():
    """4 stages, 8 microbatches and 2 rounds make 2 x 8 + 3 ticks.

    A tick is a quarter of the tokens through half of a stage's layers.
    """
    job = changed(
        llama(),
        train=dict(batch_size=64, accumulate=1),
        compute=dict(pipeline_rounds=2, pipeline_microbatches=8),
    )
    here = split_microbatch(job, ONE | {"pipeline": 4, "fsdp": 16})
    assert (here.rows, here.ticks, here.tick_layers) == (1, 19, 4)
    assert here.tick_tokens == 64 / 16 / 8 * 8192


def test_rows_and_turns_of_experts_blocks():
    """1,024 tokens make 2 choices each over 4 experts, so that an expert has 512.

    They fill a block of 512, and half a block more stays empty. An axis expert of 2 leaves a device
    2 experts of 1,024 choices each, in blocks of 512.
    """
    model = configs.Model(experts=4, experts_per_token=2)
    config = configs.Config(model=model)
    assert count_padding(config, ONE, 1024, "gpu") == 4 * 512 / 2048
    assert count_padding(config, ONE | {"expert": 2}, 1024, "gpu") == 2 * 512 / 2048
    assert count_places(config, ONE, 1024, "gpu") == 2

    small = job_of("moe:small")
    job = small._replace(config=replace(small.config, model=model))
    assert count_turns(job, ONE, 1024, "gpu") == 1.5


def test_nothing_is_padded_where_nothing_goes_by_blocks():
    model = configs.Model(experts=4, experts_per_token=2)
    limited = configs.Config(model=replace(model, dispatch="capacity"))
    grouped = configs.Config(model=model, compute=configs.Compute(expert_matmul="grouped"))
    assert count_padding(configs.Config(model=model), ONE, 1024, "tpu") == 0
    assert count_padding(limited, ONE, 1024, "gpu") == 0
    assert count_padding(grouped, ONE, 1024, "gpu") == 0
    assert count_turns(job_of("moe:small"), ONE, 1024, "tpu") == 1
    assert count_turns(llama(), ONE, 1024, "gpu") == 1


@pytest.mark.parametrize(
    "rows, platform, size",
    [
        (4, "cpu", 8),
        (16384, "gpu", 2048),
        (512, "gpu", 512),
        (100, "gpu", 64),
        (2048, "cpu", 256),
        (64, "cpu", 32),
    ],
)
def test_rows_of_a_block(rows, platform, size):
    """It has about the root of twice `sum_rows` times an expert's rows, and at most all of them."""
    sum_rows = configs.find_habits(platform).sum_rows
    assert choose_block_rows(8 * rows, 8, sum_rows) == size


EXPERTS = 8 * 3 * 4096 * 14336  # Entries of one layer of moe:8x7b.
DENSE = 3 * 4096 * 14336
ROUTER = 4096 * 8


@pytest.fixture(scope="module")
def sparse_and_mixed():
    """moe:8x7b with two layers: both of experts, and one of them dense."""
    patterns = ("(('attention','moe'),)", "(('attention','swiglu'),('attention','moe'))")
    return [
        job_of("moe:8x7b", "--config.model.layers=2", f"--config.model.pattern={pattern}")
        for pattern in patterns
    ]


def gathered_bytes(job, **axes):
    return estimate_memory(job, ONE | axes, "cudnn", "gpu").gathered


def test_weights_of_experts_that_are_gathered(sparse_and_mixed):
    """With a dense layer the mean of two layers' own matrices grows by half a feed-forward.

    It loses half a router, and a layer of experts has what it had. Over an axis expert of 8 a
    device has an eighth of the experts, and all of what is not theirs.
    """
    sparse, mixed = sparse_and_mixed
    more = gathered_bytes(mixed, fsdp=8) - gathered_bytes(sparse, fsdp=8)
    assert more == pytest.approx(2 * (DENSE - ROUTER) / 2 * 2)
    saved = gathered_bytes(sparse, fsdp=8) - gathered_bytes(sparse, expert=8)
    assert saved == pytest.approx(2 * EXPERTS * 7 / 8 * 2)


def test_without_remat_gathered_weights_stay(sparse_and_mixed):
    def count_staying(job):
        plain = changed(job, compute=dict(remat="none"))
        return gathered_bytes(plain, fsdp=8) - gathered_bytes(job, fsdp=8)

    sparse, mixed = sparse_and_mixed
    more = count_staying(sparse) - count_staying(mixed)
    assert more == pytest.approx((EXPERTS + ROUTER - DENSE) * 2)


@pytest.mark.parametrize(
    "name, axes",
    [("moe:8x7b", dict(fsdp=8)), ("moe:small", dict(fsdp=2)), ("moe:8x7b", dict(expert=8))],
)
def test_temporaries_of_the_largest_layer_count(name, axes, monkeypatch):
    """Buffers of experts count, however few of the layers have them.

    There is what comes to the experts and what comes back. Over an axis expert the tokens also
    exist as they are sent and as they arrive.
    """
    job = job_of(name)
    shape = ONE | axes
    here = split_microbatch(job, shape)
    places = count_places(job.config, shape, here.tick_tokens, "gpu")
    sent = max(widths.sent for widths in job.layers)
    copies = 6 if "expert" in axes else 2
    entries = here.tick_tokens * places * sent * copies * job.config.model.embed
    rows = entries * compute_bytes(job) * memory.INSIDE_EXPERTS

    # With these two changes a job with and one without experts differ in nothing but the rows.
    monkeypatch.setattr(memory, "INSIDE", memory.INSIDE_EXPERTS)
    monkeypatch.setitem(memory.EXPERTS, "gpu", 0.0)
    bare = [widths._replace(inner=0, hidden=0) for widths in job.layers]
    dense = [widths._replace(sent=0) for widths in bare]
    working = [
        estimate_memory(job._replace(layers=tuple(layers)), shape, "cudnn", "gpu").working
        for layers in (bare, dense)
    ]
    assert working[0] - working[1] == pytest.approx(rows)
    assert rows > 0


def test_a_layers_gradient_in_float32_is_twice_its_weights():
    """It is whole before it is scattered: 2 bytes more for each entry of a layer."""
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    wide = changed(job, compute=dict(reduce_dtype="float32"))
    shape = ONE | {"fsdp": 64}
    more = (
        estimate_memory(wide, shape, "splash", "tpu").gathered
        - estimate_memory(job, shape, "splash", "tpu").gathered
    )
    entries = (8_030_261_248 - 2 * 128_256 * 4096 - 4096) / 32
    assert more == pytest.approx(2 * entries, rel=1e-3)
