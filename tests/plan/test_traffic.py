"""What crosses the links, and how fast the links are, against figures made by hand."""

import pytest
from plans import ONE, changed, job_of, llama

from gpt_jax.config import find_habits, find_lookup_sizes
from gpt_jax.hardware import chips
from gpt_jax.plan.job import device_bytes
from gpt_jax.plan.links import Link, find_link
from gpt_jax.plan.topology import parse_topology
from gpt_jax.plan.traffic import list_flows

TABLE = 128_256 * 4096  # Entries of llama:8b's embedding, and of its head.
LAYERS = 8_030_261_248 - 2 * TABLE - 4096  # Entries of its layers.


def sum_flows(job, shape, platform, what, axis=None):
    """Bytes of the flows of one kind, over all axes or over one."""
    return sum(
        flow.bytes
        for flow in list_flows(job, shape, platform)
        if flow.what == what and axis in (None, flow.axis)
    )


def test_streams_over_tensor():
    """There are two sums forward, two backward and one recomputed, in each of 32 layers.

    Each sends 2 x 3/4 of 8,192 x 4,096 in bfloat16.
    """
    job = changed(llama(), train=dict(batch_size=16, accumulate=1))
    sent = sum_flows(job, ONE | {"fsdp": 16, "tensor": 4}, "tpu", "streams summed")
    assert sent == 5 * 32 * 2 * 0.75 * 8192 * 4096 * 2


def by_tables(**train):
    """llama:8b in one microbatch, with whole tables gathered for the embedding."""
    train = dict(accumulate=1) | train
    return changed(llama(), train=train, compute=dict(embed_lookup="tables"))


def test_weights_over_fsdp():
    """Layers are gathered twice in bfloat16, the head once, and the table once in float32."""
    job = by_tables(batch_size=64)
    shape = ONE | {"fsdp": 64}
    gathered = sum_flows(job, shape, "gpu", "weights gathered")
    assert gathered == pytest.approx(63 / 64 * 2 * (2 * LAYERS + TABLE + 2 * TABLE), rel=1e-4)
    scattered = sum_flows(job, shape, "gpu", "gradients scattered")
    assert scattered == pytest.approx(63 / 64 * (2 * (LAYERS + TABLE) + 4 * TABLE), rel=1e-4)


def test_gradients_that_are_summed_in_float32():
    """They have twice the bytes, and weights are gathered in bfloat16 as before."""
    narrow_job = by_tables(batch_size=128)
    job = changed(narrow_job, compute=dict(reduce_dtype="float32"))
    shape = ONE | {"data": 2, "fsdp": 64}
    whole = 4 * (LAYERS + 2 * TABLE)
    assert sum_flows(job, shape, "gpu", "gradients scattered") == pytest.approx(
        63 / 64 * whole, rel=1e-4
    )
    assert sum_flows(job, shape, "gpu", "gradients summed") == pytest.approx(whole / 64, rel=1e-4)
    gathered = sum_flows(job, shape, "gpu", "weights gathered")
    narrow = sum_flows(narrow_job, shape, "gpu", "weights gathered")
    assert gathered == narrow


@pytest.mark.parametrize("name, tables", [("llama:8b", 2), ("gpt2:1558m", 1)])
def test_gradients_that_are_summed_once(name, tables):
    """All are float32, and a tied table's is one. Without accumulation nothing changes."""
    shape = ONE | {"data": 8}

    def count(**train):
        job = changed(job_of(name), train=dict(batch_size=64) | train)
        return sum_flows(job, shape, "gpu", "gradients summed")

    entries = device_bytes(job_of(name), ONE, "params", bytes_each=1)
    assert (tables == 1) == job_of(name).config.model.tied
    for accumulate in (2, 8):
        assert count(accumulate=accumulate, reduce_once=True) == 2 * 7 / 8 * 4 * entries
    assert count(accumulate=8) == pytest.approx(8 * count(accumulate=1))
    assert count(accumulate=1, reduce_once=True) == count(accumulate=1)


@pytest.mark.parametrize(
    "data, what, times", [(1, "gradients summed", 2), (2, "gradients scattered", 1)]
)
def test_gradients_on_a_tpu(data, what, times):
    """Over all devices libtpu sums whole gradients.

    With another axis each device keeps its part, which is summed over the rest.
    """
    job = by_tables(batch_size=128)
    shape = ONE | {"data": data, "fsdp": 64}
    whole = 2 * (LAYERS + TABLE) + 4 * TABLE
    sent = sum_flows(job, shape, "tpu", what, "fsdp")
    assert sent == pytest.approx(times * 63 / 64 * whole, rel=1e-4)
    if data == 2:
        rest = sum_flows(job, shape, "tpu", "gradients summed", "data")
        assert rest == pytest.approx(whole / 64, rel=1e-4)


@pytest.mark.parametrize("data", [1, 2])
def test_columns_take_the_place_of_the_table(data):
    """`auto` exchanges llama:8b's columns: 8,192 tokens of 4,096 entries in bfloat16, twice.

    The table is neither gathered nor scattered. Over data each device sums its own columns.
    """
    tables = by_tables(batch_size=64 * data)
    columns = changed(tables, compute=dict(embed_lookup="auto"))
    shape = ONE | {"data": data, "fsdp": 64}

    def spare(what):
        return sum_flows(tables, shape, "gpu", what) - sum_flows(columns, shape, "gpu", what)

    assert spare("weights gathered") == pytest.approx(63 / 64 * 4 * TABLE)
    assert spare("gradients scattered") == pytest.approx(63 / 64 * 4 * TABLE)
    assert spare("gradients summed") == 0
    numbers = 64 * 8192 * 4
    assert sum_flows(columns, shape, "gpu", "embeddings exchanged", "fsdp") == pytest.approx(
        63 / 64 * (2 * 8192 * 4096 * 2 + numbers)
    )
    assert sum_flows(tables, shape, "gpu", "embeddings exchanged") == 0


def test_value_embeddings_are_exchanged_too():
    """modern:d26 has 13 tables of values. Without remat each is looked up once, as the first is."""
    job = changed(job_of("modern:d26"), compute=dict(remat="none", embed_lookup="columns"))
    shape = ONE | {"fsdp": 8}
    model = job.config.model
    train = job.config.train
    sizes = find_lookup_sizes(job.config, train, shape)
    width = model.embed + 13 * model.kv_heads * model.head_dim
    tokens = sizes.tokens * train.accumulate
    sent = 7 / 8 * tokens * (2 * 2 * width + 14 * 8 * 4)
    assert sum_flows(job, shape, "gpu", "embeddings exchanged") == pytest.approx(sent)


def test_zero_1_gathers_no_experts_over_their_own_axis():
    """Over an axis expert of 8 only what is not theirs is cut and gathered."""
    job = changed(job_of("moe:8x7b"), mesh=dict(zero=1))
    flows = list_flows(job, ONE | {"expert": 8}, "gpu")
    gathered = [
        (flow.axis, flow.bytes) for flow in flows if flow.what == "updated parameters gathered"
    ]
    others = sum(device_bytes(job, ONE, "params", 3, role) for role in ("layer", "embed", "head"))
    assert gathered == [("expert", pytest.approx(7 / 8 * others))]


@pytest.mark.parametrize("what", ["updated parameters gathered", "gradients summed"])
def test_zero_1_over_two_axes_sends_what_it_does_over_one(what):
    job = changed(llama(), mesh=dict(zero=1))
    two = sum_flows(job, ONE | {"fsdp": 8, "context": 8}, "gpu", what)
    one = sum_flows(job, ONE | {"fsdp": 64}, "gpu", what)
    assert two == pytest.approx(one)


def test_stages_sum_the_gradients_of_what_is_in_none_of_them():
    """Each stage has rows of its own for the table and the head.

    The rows go to all stages and come back.
    """
    job = llama()
    train = job.config.train
    shape = ONE | {"pipeline": 4}
    summed = sum_flows(job, shape, "gpu", "gradients summed", "pipeline")
    assert summed == pytest.approx(2 * 3 / 4 * TABLE * (2 + 4) * train.accumulate, rel=1e-3)

    rows = train.batch_size * train.seq_len / 4 * 4096 * 2  # Of a device, in bfloat16.
    sent = sum_flows(job, shape, "gpu", "rows to the stages and back", "pipeline")
    assert sent == pytest.approx(4 * 3 * rows)


def test_tokens_travel_to_experts_with_empty_places_on_v5e():
    """The exchange of v5e is padded.

    Of 8 experts on 8 devices one gets all of a device's tokens at most, and 2 choices of each
    travel.
    """
    job = job_of("moe:small")

    def count_sent(padded):
        flows = list_flows(job, ONE | {"expert": 8}, "tpu", padded)
        return sum(flow.bytes for flow in flows if flow.what == "tokens to experts")

    assert count_sent(padded=True) == 4 * count_sent(padded=False) > 0
    padded = {
        name
        for name, chip in chips.CHIPS.items()
        if not find_habits(chip.platform, chip.kind).ragged_exchange
    }
    assert padded == {"v5e"}


@pytest.mark.parametrize(
    "text, shape, axis, speed",
    [
        ("v5p:4x4x4", dict(fsdp=64), "fsdp", 3 * 200e9),  # Three closed dims.
        ("v5p:4x4x4", dict(fsdp=16, tensor=4), "tensor", 200e9),
        ("v5p:4x4x4", dict(fsdp=32, tensor=2), "tensor", 100e9),  # Half of a dim is open.
        ("TPU7x:4x4x4", dict(fsdp=64, tensor=2), "tensor", 6 * 100e9),  # Two cores of a chip.
        ("TPU7x:4x4x4", dict(fsdp=32, tensor=4), "tensor", 100e9),  # Cores and half of a dim.
        ("TPU7x:4x4x4", dict(fsdp=64, tensor=2), "fsdp", 300e9),  # Chips alone.
        ("v5e:16x16", dict(fsdp=256), "fsdp", 2 * 100e9),
        ("v5e:8x8", dict(fsdp=64), "fsdp", 2 * 50e9),
        ("h100:8", dict(fsdp=8), "fsdp", 450e9),
        ("h100:64", dict(fsdp=64), "fsdp", 8 * 50e9),
        ("h100:64", dict(data=8, fsdp=8), "data", 50e9),
        ("h100:64", dict(data=8, fsdp=8), "fsdp", 450e9),
    ],
)
def test_links(text, shape, axis, speed):
    assert find_link(parse_topology(text), ONE | shape, ONE, axis).speed == speed


@pytest.mark.parametrize(
    "shape, across, speeds",
    [
        # The cards of a host lie along data, and fsdp crosses hosts.
        (dict(data=8, fsdp=2), dict(fsdp=2), dict(data=450e9, fsdp=50e9)),
        (dict(data=2, fsdp=8), dict(data=2), dict(data=50e9, fsdp=450e9)),
        # Nothing is said: fsdp lies on neighbours, and data over both hosts.
        (dict(data=8, fsdp=2), {}, dict(data=4 * 50e9, fsdp=450e9)),
    ],
)
def test_hosts_talk_over_the_network(shape, across, speeds):
    machine = parse_topology("h100:16")
    for axis, speed in speeds.items():
        assert find_link(machine, ONE | shape, ONE | across, axis).speed == speed


def test_slices_talk_over_the_data_centre_network():
    shape = ONE | {"data": 2, "fsdp": 64}
    across = ONE | {"data": 2}
    link = find_link(parse_topology("v5p:4x4x4", 2), shape, across, "data")
    assert link == Link("DCN", 6.25e9)
