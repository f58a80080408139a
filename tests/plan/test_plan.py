"""The arithmetic of `gpt-jax plan` against numbers worked out by hand, and against the train
step's own arrays."""

import math
from dataclasses import replace

import jax
import pytest
from plans import CONFIGS, ONE, changed, job_of, llama

from gpt_jax import config as configs
from gpt_jax.commands import config_file
from gpt_jax.errors import UsageError
from gpt_jax.hardware import chips
from gpt_jax.model.experts import exchange, local_experts
from gpt_jax.plan import compiled, memory, roofline, schedule, targets, topology, traffic
from gpt_jax.plan.job import device_bytes, resolve_vocab
from gpt_jax.plan.program.program import read_program
from gpt_jax.run import parts as run_parts
from gpt_jax.sharding.mesh import make_mesh

# ---- machines ----


@pytest.mark.parametrize(
    "text, count, hosts",
    [
        ("v5p:4x4x4", 64, 16),
        ("v5e:16x16", 256, 64),
        ("TPU7x:4x4x4", 128, 16),
        ("tpu7x:2x2x1", 8, 1),
        ("h100:8", 8, 1),
        ("H200:64", 64, 8),
        ("b200:4", 4, 1),
    ],
)
def test_machines_by_name(text, count, hosts):
    found = topology.parse_topology(text)
    assert (found.devices, found.hosts) == (count, hosts)
    assert found.peak == chips.peak_flops(found.chip.kind) is not None


@pytest.mark.parametrize(
    "text, slices, words",
    [
        ("a100:8", 1, "unknown hardware 'a100'; known are v4:NxNxN"),
        ("v5p:4x4", 1, "expected v5p:NxNxN"),
        ("h100:12", 1, "do not fill hosts of 8; take h100:8 or h100:16"),
        ("v5e:0x4", 1, "expected v5e:NxN, as in v5e:4x4"),
        ("h100:64", 2, "GPUs have none; .* as in h100:128"),
        ("v5p:2x2x1", 0, "--slices=0"),
        ("v5p:100000x100000x4", 1, "than a pod of 8,960; as in v5p:16x20x28"),
        ("v5e:17x17", 1, "289 chips are more than a pod of 256; as in v5e:16x16"),
        ("v6e:3x17", 1, "1x1, 2x2, 2x4, .*, 16x16; as in v6e:4x8"),
        ("v6e:16x1", 1, "as in v6e:4x4"),
        ("v5e:2x16", 1, "as in v5e:4x8"),
        ("v5p:4x4x5", 1, "2x2x1, .* multiples of 4 up to 16x20x28; as in v5p:4x4x4"),
        ("v5p:64x4x4", 1, "as in v5p:8x8x16"),
        ("v4:1x1x1", 1, "as in v4:2x2x1"),
        ("v5p:1x1x28", 1, "as in v5p:2x2x4"),
        ("h100:65544", 1, "more than 65,536 GPUs"),
        ("h100:1000000", 1, "more than 65,536 GPUs"),
        ("v5p:2x2x1", 1025, "--slices=1025: expected 1 to 1024"),
    ],
)
def test_machines_that_are_none(text, slices, words):
    with pytest.raises(UsageError, match=words):
        topology.parse_topology(text, slices)


def test_a_whole_pod_is_a_machine():
    for name, shape in topology.PODS.items():
        assert topology.parse_topology(f"{name}:{'x'.join(map(str, shape))}").shape == shape
    assert set(topology.PODS) == {
        name for name, chip in chips.CHIPS.items() if chip.platform == "tpu"
    }


def test_every_chip_has_a_peak_and_its_clock_gives_it():
    """Peak = 2 x entries of the matrix units x clock."""
    entries_of = {
        "v4": 8 * 128**2,
        "v5e": 4 * 128**2,
        "v5p": 8 * 128**2,
        "v6e": 4 * 256**2,
        "TPU7x": 4 * 256**2,
    }
    for name, chip in chips.CHIPS.items():
        peak = chips.peak_flops(chip.kind)
        assert peak, name
        if chip.clock:
            assert 2 * entries_of[name] * chip.clock == pytest.approx(peak, rel=2e-3), name


# ---- state ----

MATRICES = 8_030_261_248 - 65 * 4096  # llama:8b without the scales of its norms


def test_parameters_and_optimiser_of_llama_8b_over_64_devices():
    shape = ONE | {"fsdp": 64}
    want = 4 * (MATRICES / 64 + 65 * 4096)
    assert device_bytes(llama(), shape, "params") == want
    counters = 2 * 4  # Adam's step and the schedule's
    assert device_bytes(llama(), shape, "opt") == 2 * want + counters


def test_zero_1_keeps_parameters_whole_and_cuts_the_optimiser():
    shape = ONE | {"fsdp": 8}
    assert device_bytes(llama(), shape, "params", zero=1) == 4 * 8_030_261_248
    assert device_bytes(llama(), shape, "opt", zero=1) == device_bytes(
        llama(), shape, "opt", zero=3
    )


def test_pipeline_cuts_layers_and_tensor_cuts_matrices():
    layers = 32 * (4096 * (4096 + 1024) * 2 + 3 * 4096 * 14_336)
    tables = 2 * 128_256 * 4096
    assert device_bytes(llama(), ONE | {"pipeline": 4}, "params") == 4 * (
        layers / 4 + tables + 64 * 4096 / 4 + 4096
    )
    assert device_bytes(llama(), ONE | {"tensor": 8}, "params") == 4 * (
        (layers + tables) / 8 + 65 * 4096
    )


@pytest.mark.parametrize("spec", ["tiny", "modern:d4"])
@pytest.mark.parametrize(
    "shape",
    [dict(fsdp=2, tensor=2, data=2), dict(fsdp=4, context=2), dict(pipeline=2, fsdp=2, tensor=2)],
)
@pytest.mark.parametrize("zero", [1, 3])
def test_state_is_that_of_the_train_step(spec, shape, zero):
    """Bytes by arithmetic = bytes of the shards of the abstract state on the mesh itself."""
    job = job_of(spec)
    config = replace(
        job.config,
        compute=replace(job.config.compute, kernel="reference"),
        mesh=configs.Mesh(zero=zero),
    )
    mesh = make_mesh(shape, jax.devices()[:8])
    state = run_parts.make_steps(config, mesh).abstract

    def shard(leaf):
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    for part, tree in (("params", state.params), ("opt", state.opt)):
        assert device_bytes(job, dict(mesh.shape), part, zero) == sum(
            map(shard, jax.tree.leaves(tree))
        ), part


@pytest.mark.parametrize(
    "text, vocab",
    [("bytes", 257), ("bpe:1000", 1000), ("bpe:1_000:gpt2+chat", 1002), ("bytes+fim", 260)],
)
def test_a_tokenizer_with_a_size_of_its_own(text, vocab):
    given = [
        f"--config.data.tokenizer={text}",
        "--config.model.vocab=0",
        "--config.model.vocab_multiple=1",
    ]
    assert (
        resolve_vocab(config_file.load_config(str(CONFIGS / "tiny.py"), given)).model.vocab == vocab
    )


def test_a_plan_reads_no_text():
    assert resolve_vocab(config_file.load_config(str(CONFIGS / "tiny.py"), [])).model.vocab == 264
    with pytest.raises(UsageError, match="config.model.vocab = 0: a plan reads no text"):
        resolve_vocab(config_file.load_config(f"{CONFIGS / 'shakespeare_char.py'}:cpu", []))
    prepared = ["--config.data.path=corpus", "--config.data.tokenizer=", "--config.model.vocab=0"]
    with pytest.raises(
        UsageError,
        match="config.data.tokenizer = '' means that of the prepared folder or token files",
    ):
        resolve_vocab(config_file.load_config(str(CONFIGS / "tiny.py"), prepared))


# ---- activations and logits ----


def test_activations_of_llama_8b():
    """One row a device under remat `block`: 32 streams of 8,192 x 4,096 in bfloat16, and the one
    that comes out."""
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    stream = 8192 * 4096 * 2
    assert memory.memory(job, ONE | {"fsdp": 64}, "splash", "tpu").activations == 33 * stream
    cut = changed(job, compute=dict(shard_sequence=True))
    assert (
        memory.memory(cut, ONE | {"fsdp": 16, "tensor": 4}, "splash", "tpu").activations
        == 4 * 33 * stream / 4
    )
    assert (
        memory.memory(job, ONE | {"fsdp": 32, "context": 2}, "splash", "tpu").activations
        == 33 * stream
    )


def test_logits_of_llama_8b():
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    assert (
        memory.memory(job, ONE | {"fsdp": 64}, "splash", "tpu").logits
        == memory.LOGITS * 1024 * 128_256 * 4
    )
    job = changed(job, train=dict(loss_chunk=0))
    logits = memory.memory(job, ONE | {"fsdp": 8, "tensor": 8}, "splash", "tpu").logits
    assert logits == memory.LOGITS * 8 * 8192 * 128_256 / 8 * 4


def test_rows_and_turns_of_experts_blocks():
    """1,024 tokens x 2 choices over 4 experts: 512 each, in a block of 512, and half a block
    more. An axis expert of 2 leaves a device 2 experts of 1,024 choices each, in blocks of 512."""
    model = configs.Model(experts=4, experts_per_token=2)
    assert memory.padding(model, ONE, 1024, "gpu") == 4 * 512 / 2048
    job = job_of("moe:small")
    job = job._replace(config=replace(job.config, model=model))
    assert memory.turns(job, ONE, 1024, "gpu") == 1.5
    assert memory.turns(llama(), ONE, 1024, "gpu") == memory.turns(job, ONE, 1024, "tpu") == 1
    assert memory.padding(model, ONE | {"expert": 2}, 1024, "gpu") == 2 * 512 / 2048
    assert (
        memory.padding(model, ONE, 1024, "tpu")
        == memory.padding(replace(model, dispatch="capacity"), ONE, 1024, "gpu")
        == 0
    )
    assert memory.spare(model, ONE, 1024, "gpu") == 2


def test_weights_of_experts_that_are_gathered():
    """moe:8x7b, two layers. Of two, one dense: the layers' own matrices are on average half a
    feed-forward more, less half a router, and a layer of experts holds what it held. Over an
    axis expert of 8 a device has an eighth of the experts, and all of what is not theirs."""
    experts, dense, router = 8 * 3 * 4096 * 14336, 3 * 4096 * 14336, 4096 * 8
    both, mixed = (
        job_of("moe:8x7b", "--config.model.layers=2", f"--config.model.pattern={pattern}")
        for pattern in ("(('attention','moe'),)", "(('attention','swiglu'),('attention','moe'))")
    )

    def held(job, **axes):
        return memory.memory(job, ONE | axes, "cudnn", "gpu").gathered

    assert held(mixed, fsdp=8) - held(both, fsdp=8) == pytest.approx(2 * (dense - router) / 2 * 2)
    assert held(both, fsdp=8) - held(both, expert=8) == pytest.approx(2 * experts * 7 / 8 * 2)
    none = [
        memory.memory(
            changed(job, compute=dict(remat="none")), ONE | {"fsdp": 8}, "cudnn", "gpu"
        ).gathered
        for job in (both, mixed)
    ]
    assert none[0] - held(both, fsdp=8) - (none[1] - held(mixed, fsdp=8)) == pytest.approx(
        (experts + router - dense) * 2
    )


def test_zero_1_gathers_no_experts_over_their_own_axis():
    """Over an axis expert of 8 only what is not theirs is cut and gathered."""
    job, shape = changed(job_of("moe:8x7b"), mesh=dict(zero=1)), ONE | {"expert": 8}
    gathered = [
        flow
        for flow in traffic.flows(job, shape, "gpu")
        if flow.what == "updated parameters gathered"
    ]
    others = sum(device_bytes(job, ONE, "params", 3, role) for role in ("layer", "embed", "head"))
    assert [(flow.axis, flow.bytes) for flow in gathered] == [
        ("expert", pytest.approx(7 / 8 * others))
    ]


def test_zero_1_over_two_axes_sends_what_it_does_over_one():
    job = changed(llama(), mesh=dict(zero=1))

    def sent(shape):
        flows = traffic.flows(job, ONE | shape, "gpu")
        return {
            what: sum(flow.bytes for flow in flows if flow.what == what and flow.axis in shape)
            for what in ("updated parameters gathered", "gradients summed")
        }

    assert sent({"fsdp": 8, "context": 8}) == pytest.approx(sent({"fsdp": 64}))


def test_stages_sum_the_gradients_of_what_is_in_none_of_them():
    """Each has rows of its own for the table and the head; the rows go to all stages and come
    back."""
    job, shape = llama(), ONE | {"pipeline": 4}
    flows = {
        flow.what: flow.bytes
        for flow in traffic.flows(job, shape, "gpu")
        if flow.axis == "pipeline"
    }
    matrix = 128_256 * 4096
    assert flows["gradients summed"] == pytest.approx(
        2 * 3 / 4 * matrix * (2 + 4) * job.config.train.accumulate, rel=1e-3
    )
    rows = (
        job.config.train.batch_size * job.config.train.seq_len / 4 * 4096 * 2
    )  # of a device, in bfloat16
    assert flows["rows to the stages and back"] == pytest.approx(4 * 3 * rows)


@pytest.mark.parametrize(
    "name, axes",
    [("moe:8x7b", dict(fsdp=8)), ("moe:small", dict(fsdp=2)), ("moe:8x7b", dict(expert=8))],
)
def test_the_largest_layer_s_temporaries_count(name, axes, monkeypatch):
    """Experts' buffers, however few of the layers have them: what comes to them and what comes
    back, and over an axis expert also as it is sent and as it arrives."""
    job, shape = job_of(name), ONE | axes
    here = memory.local(job, shape)
    wide = max((widths for widths in job.layers), key=lambda widths: widths.sent)
    places = (
        memory.spare(job.config.model, shape, here.tick_tokens, "gpu")
        * wide.sent
        * (6 if "expert" in axes else 2)
    )
    rows = (
        here.tick_tokens
        * places
        * job.config.model.embed
        * memory.compute_bytes(job)
        * memory.INSIDE_EXPERTS
    )
    monkeypatch.setattr(memory, "INSIDE", memory.INSIDE_EXPERTS)  # nothing but the rows differs
    monkeypatch.setitem(memory.EXPERTS, "gpu", 0.0)
    layers = [
        [widths._replace(inner=0, hidden=0, sent=sent * widths.sent) for widths in job.layers]
        for sent in (1, 0)
    ]
    working = [
        memory.memory(job._replace(layers=tuple(some)), shape, "cudnn", "gpu").working
        for some in layers
    ]
    assert working[0] - working[1] == pytest.approx(rows) and rows > 0


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
    """About the root of twice SUM_ROWS times an expert's rows, and no more than those."""
    assert local_experts.choose_block_rows(8 * rows, 8, platform) == size


def test_what_remat_keeps_is_ordered():
    peaks = [
        memory.memory(
            changed(llama(), compute=dict(remat=remat)), ONE | {"fsdp": 64}, "splash", "tpu"
        ).activations
        for remat in ("block", "dots", "none")
    ]
    assert peaks == sorted(peaks) and peaks[0] * 3 < peaks[1] < peaks[2]


def test_a_pipeline_ticks():
    """4 stages, 8 microbatches, 2 rounds: 2 x 8 + 3 ticks of a quarter of a half of the layers."""
    job = changed(
        llama(),
        train=dict(batch_size=64, accumulate=1),
        compute=dict(pipeline_rounds=2, pipeline_microbatches=8),
    )
    here = memory.local(job, ONE | {"pipeline": 4, "fsdp": 16})
    assert (here.rows, here.ticks, here.tick_layers) == (1, 19, 4)
    assert here.tick_tokens == 64 / 16 / 8 * 8192


# ---- what crosses the links ----


def test_streams_over_tensor():
    """Two sums forward, two backward, one recomputed, of 8,192 x 4,096 bfloat16 in each of 32
    layers; each 2 x 3/4 of it."""
    job = changed(llama(), train=dict(batch_size=16, accumulate=1))
    flows = traffic.flows(job, ONE | {"fsdp": 16, "tensor": 4}, "tpu")
    assert [flow.bytes for flow in flows if flow.what == "streams summed"] == [
        5 * 32 * 2 * 0.75 * 8192 * 4096 * 2
    ]


def test_weights_over_fsdp():
    """Layers twice, in bfloat16, the head once, the table once in float32."""
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    layers, table = MATRICES - 2 * 128_256 * 4096 + 64 * 4096, 128_256 * 4096
    flows = traffic.flows(job, ONE | {"fsdp": 64}, "gpu")
    gathered = sum(flow.bytes for flow in flows if flow.what == "weights gathered")
    assert gathered == pytest.approx(63 / 64 * 2 * (2 * layers + table + 2 * table), rel=1e-4)
    scattered = sum(flow.bytes for flow in flows if flow.what == "gradients scattered")
    assert scattered == pytest.approx(63 / 64 * (2 * (layers + table) + 4 * table), rel=1e-4)


@pytest.mark.parametrize(
    "text, shape, axis, speed",
    [
        ("v5p:4x4x4", dict(fsdp=64), "fsdp", 3 * 200e9),  # three closed dims
        ("v5p:4x4x4", dict(fsdp=16, tensor=4), "tensor", 200e9),
        ("v5p:4x4x4", dict(fsdp=32, tensor=2), "tensor", 100e9),  # half of a dim is open
        ("TPU7x:4x4x4", dict(fsdp=64, tensor=2), "tensor", 6 * 100e9),  # the two cores of a chip
        ("TPU7x:4x4x4", dict(fsdp=32, tensor=4), "tensor", 100e9),  # both, and half of a dim
        ("TPU7x:4x4x4", dict(fsdp=64, tensor=2), "fsdp", 300e9),  # chips alone
        ("v5e:16x16", dict(fsdp=256), "fsdp", 2 * 100e9),
        ("v5e:8x8", dict(fsdp=64), "fsdp", 2 * 50e9),
        ("h100:8", dict(fsdp=8), "fsdp", 450e9),
        ("h100:64", dict(fsdp=64), "fsdp", 8 * 50e9),
        ("h100:64", dict(data=8, fsdp=8), "data", 50e9),
        ("h100:64", dict(data=8, fsdp=8), "fsdp", 450e9),
    ],
)
def test_links(text, shape, axis, speed):
    assert traffic.link(topology.parse_topology(text), ONE | shape, ONE, axis).speed == speed


@pytest.mark.parametrize(
    "shape, across, speeds",
    [
        (
            dict(data=8, fsdp=2),
            dict(fsdp=2),
            dict(data=450e9, fsdp=50e9),
        ),  # a host's cards along data
        (dict(data=2, fsdp=8), dict(data=2), dict(data=50e9, fsdp=450e9)),
        (dict(data=8, fsdp=2), {}, dict(data=4 * 50e9, fsdp=450e9)),
    ],
)  # fsdp on neighbours, data over both hosts
def test_hosts_talk_over_the_network(shape, across, speeds):
    machine = topology.parse_topology("h100:16")
    assert {
        axis: traffic.link(machine, ONE | shape, ONE | across, axis).speed for axis in speeds
    } == speeds


def test_slices_talk_over_the_data_centre_network():
    two = topology.parse_topology("v5p:4x4x4", 2)
    assert traffic.link(
        two, ONE | {"data": 2, "fsdp": 64}, ONE | {"data": 2}, "data"
    ) == traffic.Link("DCN", 6.25e9)


@pytest.mark.parametrize(
    "data, what, sent", [(1, "gradients summed", 2), (2, "gradients scattered", 1)]
)
def test_gradients_on_a_tpu(data, what, sent):
    """libtpu sums whole ones over all devices there are; else each keeps its part, which is
    summed over the rest."""
    job = changed(llama(), train=dict(batch_size=128, accumulate=1))
    layers, table = MATRICES - 2 * 128_256 * 4096 + 64 * 4096, 128_256 * 4096
    whole = 2 * (layers + table) + 4 * table
    flows = {
        (flow.axis, flow.what): flow.bytes
        for flow in traffic.flows(job, ONE | {"data": data, "fsdp": 64}, "tpu")
    }
    assert flows["fsdp", what] == pytest.approx(sent * 63 / 64 * whole, rel=1e-4)
    assert data == 1 or flows["data", "gradients summed"] == pytest.approx(whole / 64, rel=1e-4)


def test_tokens_travel_to_experts_with_empty_places_on_v5e():
    """Whose exchange is padded: of 8 experts on 8 devices one gets all of a device's tokens at
    most, and 2 choices of each travel."""
    job, shape = job_of("moe:small"), ONE | {"expert": 8}
    sent = {
        padded: next(
            flow.bytes
            for flow in traffic.flows(job, shape, "tpu", padded)
            if flow.what == "tokens to experts"
        )
        for padded in (False, True)
    }
    assert sent[True] == 4 * sent[False] > 0
    assert {name for name, chip in chips.CHIPS.items() if chip.kind in exchange.EXCHANGES} == {
        "v5e"
    }


def test_the_whole_step_as_arithmetic_and_compiler_have_it():
    """Arguments of the compiled train step on 8 fake devices = state and batch by arithmetic;
    gathers over fsdp are there."""
    job = job_of("tiny")
    config = replace(
        job.config,
        mesh=configs.Mesh(data=2, fsdp=4),
        compute=replace(job.config.compute, kernel="reference"),
    )
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices()[:8])
    done = compiled.lower_step(config, mesh).compile()
    used = memory.memory(job._replace(config=config), dict(mesh.shape), "reference", "gpu")
    assert done.memory_analysis().argument_size_in_bytes == pytest.approx(
        used.state + used.batch, abs=8
    )
    found = read_program(done.as_text(), dict(mesh.shape))
    assert ("all-gather", ("fsdp",)) in {(row.kind, row.axes) for row in found.collectives}


# ---- time ----


def test_float32_takes_what_it_takes():
    """On GPUs half of the matmuls' rate, on TPUs the same; twice the bytes between matmuls on
    both."""
    for name, slower in (("h100:8", 2), ("v5e:4x4", 1)):
        machine = topology.parse_topology(name)
        half, full = (
            changed(
                llama(),
                mesh=dict(data=1, fsdp=machine.devices),
                compute=dict(dtype=dtype, kernel="xla"),
            )
            for dtype in ("bfloat16", "float32")
        )
        shape = ONE | {"fsdp": machine.devices}
        here = memory.local(half, shape)
        times = [roofline.compute_seconds(job, machine, "xla", shape, here) for job in (half, full)]
        assert times[1] == pytest.approx(slower * times[0])
        logits = (
            4
            * here.tokens
            * half.config.model.vocab
            * 4
            * half.config.train.accumulate
            / machine.chip.bandwidth
        )
        passes = [
            roofline.passes_seconds(job, machine, "splash", shape, here) - logits
            for job in (half, full)
        ]
        assert passes[1] == pytest.approx(2 * passes[0])


@pytest.mark.parametrize("cycles", [0, 10**9])
def test_a_program_without_cycles_takes_the_arithmetic_s_time(cycles):
    """The update of the optimiser included, which cycles have."""
    machine = topology.parse_topology("h100:8" if not cycles else "v5e:4x4")
    job = changed(llama(), mesh=dict(data=1, fsdp=machine.devices))
    seen = roofline.estimate_job(job, machine)
    program = dict(
        collectives=[],
        cycles=cycles,
        kernels={},
        matmul_flops=0.0,
        turn_flops=0.0,
        grouped_flops=0.0,
    )
    time = schedule.estimate_schedule(job, machine, seen.kernel, program)
    if cycles:
        assert time.update == 0 and time.step == pytest.approx(
            cycles / machine.chip.clock + time.kernels
        )
    else:
        assert time.update == seen.update > 0
        assert time.step == pytest.approx(seen.matmuls + seen.passes + seen.update)


def test_grouped_matmuls_without_cycles_take_the_arithmetic_s_time():
    """Rows of the exchange's buffers that stay empty cost nothing."""
    machine = topology.parse_topology("v5e:4x4")
    job = changed(job_of("moe:small"), mesh=dict(data=1, fsdp=8, expert=2))
    program = dict(collectives=[], cycles=1, kernels={}, matmul_flops=0.0, turn_flops=0.0)
    times = [
        schedule.estimate_schedule(job, machine, "splash", program | {"grouped_flops": flops})
        for flops in (0.0, 1e15)
    ]
    room = memory.room(job.config.model, ONE | {"expert": 2})
    assert room > 1
    assert times[1].step - times[0].step == pytest.approx(
        1e15 / room / machine.peak / roofline.EFFICIENCY["tpu"]
    )
    assert times[1].flops_ratio - times[0].flops_ratio > 0


def test_cards_are_described_by_the_table_of_devices():
    for name in targets.CARDS:
        chip, lines = chips.CHIPS[name], targets.describe_card(name)
        assert f"device_memory_size: {chip.shown}\n" in lines and f'"{chip.kind}"' in lines
        assert chip.memory == int(0.9 * chip.shown)
    assert set(targets.CARDS) == {
        name for name, chip in chips.CHIPS.items() if chip.platform == "gpu"
    }
