"""`gpt-jax plan`: its arithmetic against numbers worked out by hand, its reader against programs whose bytes are
known."""

import json
import math
from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from gpt_jax import config as configs
from gpt_jax import devices, experiment, sharding
from gpt_jax.commands import flags, main
from gpt_jax.commands import plan as command
from gpt_jax.errors import UsageError
from gpt_jax.plan import compiled, hlo, memory, options, roofline, search, topology, traffic
from gpt_jax.plan.job import entries, make_job, with_vocab

from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = devices.GIB
ONE = dict.fromkeys(configs.AXES, 1)


@lru_cache(maxsize=None)
def job_of(spec: str, *overrides: str):
    name, _, variant = spec.partition(":")
    return make_job(flags.load_config(f"{CONFIGS / name}.py" + f":{variant}" * bool(variant), list(overrides)))


def llama(*overrides: str):
    return job_of("llama:8b", *overrides)


def changed(job, **sections):
    """The job with other knobs: `model=dict(remat="none")`."""
    made = {name: replace(getattr(job.config, name), **knobs) for name, knobs in sections.items()}
    return job._replace(config=replace(job.config, **made))


# ---- machines ----

@pytest.mark.parametrize("text, count, hosts", [("v5p:4x4x4", 64, 16), ("v5e:16x16", 256, 64),
                                                ("TPU7x:4x4x4", 128, 16), ("tpu7x:2x2x1", 8, 1), ("h100:8", 8, 1),
                                                ("H200:64", 64, 8), ("b200:4", 4, 1)])
def test_machines_by_name(text, count, hosts):
    found = topology.parse(text)
    assert (found.devices, found.hosts) == (count, hosts)
    assert found.peak == devices.peak_flops(found.chip.kind) is not None


@pytest.mark.parametrize("text, slices, words", [("a100:8", 1, "unknown hardware 'a100'; known are v4:NxNxN"),
                                                 ("v5p:4x4", 1, "expected v5p:NxNxN"),
                                                 ("h100:12", 1, "do not fill hosts"),
                                                 ("v5e:0x4", 1, "expected v5e:NxN"), ("h100:8", 2, "GPUs have none"),
                                                 ("v5p:2x2x1", 0, "--slices=0")])
def test_machines_that_are_none(text, slices, words):
    with pytest.raises(UsageError, match=words):
        topology.parse(text, slices)


def test_every_chip_has_a_peak_and_its_clock_gives_it():
    """Peak = 2 x entries of the matrix units x clock."""
    entries_of = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2, "TPU7x": 4 * 256**2}
    for name, chip in devices.CHIPS.items():
        peak = devices.peak_flops(chip.kind)
        assert peak, name
        if chip.clock:
            assert 2 * entries_of[name] * chip.clock == pytest.approx(peak, rel=2e-3), name


# ---- state ----

MATRICES = 8_030_261_248 - 65 * 4096  # llama:8b without the scales of its norms


def test_parameters_and_optimiser_of_llama_8b_over_64_devices():
    shape = ONE | {"fsdp": 64}
    want = 4 * (MATRICES / 64 + 65 * 4096)
    assert entries(llama(), shape, "params") == want
    counters = 2 * 4  # Adam's step and the schedule's
    assert entries(llama(), shape, "opt") == 2 * want + counters


def test_zero_1_keeps_parameters_whole_and_cuts_the_optimiser():
    shape = ONE | {"fsdp": 8}
    assert entries(llama(), shape, "params", zero=1) == 4 * 8_030_261_248
    assert entries(llama(), shape, "opt", zero=1) == entries(llama(), shape, "opt", zero=3)


def test_pipeline_cuts_layers_and_tensor_cuts_matrices():
    layers = 32 * (4096 * (4096 + 1024) * 2 + 3 * 4096 * 14_336)
    tables = 2 * 128_256 * 4096
    assert entries(llama(), ONE | {"pipeline": 4}, "params") == 4 * (layers / 4 + tables + 64 * 4096 / 4 + 4096)
    assert entries(llama(), ONE | {"tensor": 8}, "params") == 4 * ((layers + tables) / 8 + 65 * 4096)


@pytest.mark.parametrize("spec", ["tiny", "modern:d4"])
@pytest.mark.parametrize("shape", [dict(fsdp=2, tensor=2, data=2), dict(fsdp=4, context=2),
                                   dict(pipeline=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("zero", [1, 3])
def test_state_is_that_of_the_train_step(spec, shape, zero):
    """Bytes by arithmetic = bytes of the shards of the abstract state on the mesh itself."""
    job = job_of(spec)
    config = replace(job.config, model=replace(job.config.model, kernel="reference"), mesh=configs.Mesh(zero=zero))
    mesh = sharding.make_mesh(shape, jax.devices()[:8])
    state = experiment.make_steps(config, mesh).abstract
    shard = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for part, tree in (("params", state.params), ("opt", state.opt)):
        assert entries(job, dict(mesh.shape), part, zero) == sum(map(shard, jax.tree.leaves(tree))), part


def test_a_plan_reads_no_text():
    assert with_vocab(flags.load_config(str(CONFIGS / "tiny.py"), [])).model.vocab == 264
    with pytest.raises(UsageError, match="config.model.vocab = 0: a plan reads no text"):
        with_vocab(flags.load_config(f"{CONFIGS / 'shakespeare_char.py'}:cpu", []))


# ---- activations and logits ----

def test_activations_of_llama_8b():
    """One row a device under remat `block`: 32 streams of 8,192 x 4,096 in bfloat16, and the one that comes out."""
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    stream = 8192 * 4096 * 2
    assert memory.memory(job, ONE | {"fsdp": 64}, "splash", "tpu").activations == 33 * stream
    cut = changed(job, model=dict(shard_sequence=True))
    assert memory.memory(cut, ONE | {"fsdp": 16, "tensor": 4}, "splash", "tpu").activations == 4 * 33 * stream / 4
    assert memory.memory(job, ONE | {"fsdp": 32, "context": 2}, "splash", "tpu").activations == 33 * stream


def test_logits_of_llama_8b():
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    assert memory.memory(job, ONE | {"fsdp": 64}, "splash", "tpu").logits == memory.LOGITS * 1024 * 128_256 * 4
    job = changed(job, train=dict(loss_chunk=0))
    logits = memory.memory(job, ONE | {"fsdp": 8, "tensor": 8}, "splash", "tpu").logits
    assert logits == memory.LOGITS * 8 * 8192 * 128_256 / 8 * 4


def test_what_remat_keeps_is_ordered():
    peaks = [memory.memory(changed(llama(), model=dict(remat=remat)), ONE | {"fsdp": 64}, "splash", "tpu").activations
             for remat in ("block", "dots", "none")]
    assert peaks == sorted(peaks) and peaks[0] * 3 < peaks[1] < peaks[2]


def test_a_pipeline_ticks():
    """4 stages, 8 microbatches, 2 rounds: 2 x 8 + 3 ticks of a quarter of a half of the layers."""
    job = changed(llama(), train=dict(batch_size=64, accumulate=1),
                  model=dict(pipeline_rounds=2, pipeline_microbatches=8))
    here = memory.local(job, ONE | {"pipeline": 4, "fsdp": 16})
    assert (here.rows, here.ticks, here.tick_layers) == (1, 19, 4)
    assert here.tick_tokens == 64 / 16 / 8 * 8192


# ---- what crosses the links ----

def test_streams_over_tensor():
    """Two sums forward, two backward, one recomputed, of 8,192 x 4,096 bfloat16 in each of 32 layers; each 2 x 3/4 of
    it."""
    job = changed(llama(), train=dict(batch_size=16, accumulate=1))
    flows = traffic.flows(job, ONE | {"fsdp": 16, "tensor": 4}, "tpu")
    assert [flow.bytes for flow in flows if flow.what == "streams summed"] == [5 * 32 * 2 * 0.75 * 8192 * 4096 * 2]


def test_weights_over_fsdp():
    """Layers twice, the head 8 chunks + 1 times, the table once, all in bfloat16."""
    job = changed(llama(), train=dict(batch_size=64, accumulate=1))
    layers, table = MATRICES - 2 * 128_256 * 4096 + 64 * 4096, 128_256 * 4096
    flows = traffic.flows(job, ONE | {"fsdp": 64}, "gpu")
    gathered = sum(flow.bytes for flow in flows if flow.what == "weights gathered")
    assert gathered == pytest.approx(63 / 64 * 2 * (2 * layers + 9 * table + table), rel=1e-4)
    scattered = sum(flow.bytes for flow in flows if flow.what == "gradients scattered")
    assert scattered == pytest.approx(63 / 64 * (2 * (layers + 8 * table) + 4 * table), rel=1e-4)


@pytest.mark.parametrize("text, shape, axis, speed", [
    ("v5p:4x4x4", dict(fsdp=64), "fsdp", 3 * 200e9),  # three closed dims
    ("v5p:4x4x4", dict(fsdp=16, tensor=4), "tensor", 200e9),
    ("v5p:4x4x4", dict(fsdp=32, tensor=2), "tensor", 100e9),  # half of a dim is open
    ("v5e:16x16", dict(fsdp=256), "fsdp", 2 * 100e9), ("v5e:8x8", dict(fsdp=64), "fsdp", 2 * 50e9),
    ("h100:8", dict(fsdp=8), "fsdp", 450e9), ("h100:64", dict(fsdp=64), "fsdp", 8 * 50e9),
    ("h100:64", dict(data=8, fsdp=8), "data", 50e9), ("h100:64", dict(data=8, fsdp=8), "fsdp", 450e9)])
def test_links(text, shape, axis, speed):
    assert traffic.link(topology.parse(text), ONE | shape, ONE, axis).speed == speed


def test_slices_talk_over_the_data_centre_network():
    two = topology.parse("v5p:4x4x4", 2)
    assert traffic.link(two, ONE | {"data": 2, "fsdp": 64}, ONE | {"data": 2}, "data") == traffic.Link("DCN", 6.25e9)


# ---- verdicts, advice, search ----

def test_every_problem_is_named():
    shape, found = roofline.problems(changed(llama(), mesh=dict(fsdp=1, tensor=16, data=-1)).config, 64)
    assert shape["data"] == 4
    assert len(found) == 1 and "config.model.kv_heads = 8: must divide by config.mesh.tensor = 16" in found[0]
    job = changed(llama(), mesh=dict(fsdp=-1), train=dict(batch_size=100, seq_len=8200), model=dict(heads=31))
    _, found = roofline.problems(job.config, 64)
    assert [line.split(" ")[0] for line in found] == ["config.model.kv_heads", "config.train.batch_size",
                                                      "config.train.batch_size", "config.train.loss_chunk"]


def test_what_does_not_fit_is_told_what_would():
    machine = topology.parse("v5e:4x4")
    job = changed(llama(), mesh=dict(fsdp=-1), train=dict(accumulate=1, batch_size=512), eval=dict(batch_size=512))
    seen = roofline.estimate(job, machine)
    assert not seen.fits and roofline.verdict(seen.memory.peak, machine).startswith("does not fit: peak ")
    offers = search.advice(job, machine)
    assert offers
    for config, _ in offers:
        values = configs.to_dict(job.config)
        for text in search.overrides(job.config, config):
            configs.override(values, *text.removeprefix("--config.").split("=", 1))
        again = roofline.estimate(job._replace(config=configs.resolve(configs.from_dict(values))), machine)
        assert again.fits and not again.problems


def test_the_winner_of_a_search_reproduces(capsys):
    base = ["--config", f"{CONFIGS / 'llama.py'}:1b", "--topology=v5e:4x4", "--json"]
    command.main([*base, "--search"])
    first = json.loads(capsys.readouterr().out)
    steps = [float(f"{row['step_seconds']:.3g}") for row in first["search"]]
    assert steps == sorted(steps)
    winner = [word for word in first["command"].split() if word.startswith("--config.")]
    command.main([*base, *winner])
    again = json.loads(capsys.readouterr().out)
    assert [again[key] for key in ("mesh", "memory", "step_seconds")] == [
        first[key] for key in ("mesh", "memory", "step_seconds")]
    assert again["fits"]


def test_the_command_says_no_with_code_2(capsys):
    with pytest.raises(UsageError, match="does not fit: peak"):
        command.main(["--config", f"{CONFIGS / 'llama.py'}:70b", "--topology=h100:8", "--config.train.batch_size=8",
                      "--config.train.accumulate=1", "--config.eval.batch_size=8"])
    assert "problem: does not fit" in capsys.readouterr().out


def test_a_compiler_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(command, "_there", lambda name: False)
    for machine, extra in (("v5e:2x2", "plan"), ("h100:8", "plan-gpu")):
        with pytest.raises(UsageError, match=rf"pip install 'gpt_jax\[{extra}\]'"):
            command.main(["--config", str(CONFIGS / "tiny.py"), f"--topology={machine}", "--compile"])


def test_plan_is_listed():
    assert "plan" in main.COMMANDS


def test_options():
    assert options.parse(["a=true", "b=-3", "c=x"]) == {"a": True, "b": -3, "c": "x"}
    with pytest.raises(UsageError, match="--option=a"):
        options.parse(["a"])


# ---- programs ----

def program(fn, shape, *arrays):
    """What hlo.read finds in `fn` compiled for fake CPU devices; arrays: (dims, spec) in float32."""
    mesh = sharding.make_mesh(shape, jax.devices()[:math.prod(shape.values())])
    with jax.set_mesh(mesh):
        given = [jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec)) for dims, spec in arrays]
        text = jax.jit(fn).lower(*given).compile().as_text()
    return hlo.read(text, dict(mesh.shape))


def rows(found):
    return [(row.kind, row.axes, row.bytes, row.calls) for row in found.collectives]


def test_a_gather_in_a_loop_counts_as_often_as_it_runs():
    def fn(stack, x):
        body = lambda x, w: (jnp.tanh(jnp.matmul(x, jax.reshard(w, P(None, None)), out_sharding=P("data", None))), None)
        return jax.lax.scan(body, x, stack)[0]

    found = program(fn, dict(data=2, fsdp=4), ((6, 64, 64), P(None, "fsdp", None)), ((16, 64), P("data", None)))
    assert rows(found) == [("all-gather", ("fsdp",), 64 * 64 * 4 * 3 // 4, 6)]
    assert found.matmul_flops in (0.0, 6 * 2 * 8 * 64 * 64)  # 0: the CPU backend may call a library


def test_loops_in_loops():
    def fn(x):
        inner = lambda x, _: (jax.lax.psum(x, "tensor") * 0.5, None)
        outer = lambda x, _: (jax.lax.scan(inner, x, None, 3)[0] + 1, None)
        return jax.shard_map(lambda x: jax.lax.scan(outer, x, None, 5)[0], in_specs=P(None), out_specs=P(None),
                             check_vma=False)(x)

    found = program(fn, dict(fsdp=2, tensor=4), ((128,), P(None)))
    assert rows(found) == [("all-reduce", ("tensor",), round(2 * 0.75 * 128 * 4), 15)]


@pytest.mark.parametrize("fn, want", [
    (lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
     ("collective-permute", ("fsdp",), 256 * 4)),
    (lambda x: jax.lax.all_to_all(x.reshape(4, 64), "fsdp", 0, 0).reshape(256), ("all-to-all", ("fsdp",), 192 * 4)),
    (lambda x: jax.lax.psum(x, ("fsdp", "tensor")), ("all-reduce", ("fsdp", "tensor"), round(2 * 7 / 8 * 256 * 4)))])
def test_kinds_axes_and_bytes(fn, want):
    mapped = lambda x: jax.shard_map(fn, in_specs=P(None), out_specs=P(None), check_vma=False)(x)
    assert rows(program(mapped, dict(fsdp=4, tensor=2), ((256,), P(None)))) == [(*want, 1)]


def test_replica_groups_in_every_notation():
    want = [[0, 2, 4, 6], [1, 3, 5, 7]]
    for text in ("replica_groups={{0,2,4,6},{1,3,5,7}}", "replica_groups=[2,4]<=[4,2]T(1,0)",
                 "replica_groups=mesh['a'=4,'b'=2] {'a'}"):
        assert hlo.groups(text).tolist() == want, text
    assert hlo.groups("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}").tolist() == want
    assert hlo.groups("replica_groups=mesh['a'=8] {'a':(1)4}").tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert hlo.groups("source_target_pairs={{0,1},{1,0}}").tolist() == [[0, 1], [1, 0]]
    assert hlo.axes_of(hlo.groups("replica_groups=[2,4]<=[4,2]T(1,0)"), {"fsdp": 4, "tensor": 2}) == ("fsdp",)


TPU_TEXT = """HloModule jit_f, is_scheduled=true

%start.1 (p: bf16[8,64]) -> bf16[64,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  %all-gather.1 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %call.1 = (bf16[8,64], bf16[64,64]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%middle.1 (q: bf16[8,64]) -> bf16[64,64] {
  %q = bf16[8,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[64,64]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=5, replica_groups=[1,8]<=[8],
  dimensions={0}
}

%body.1 (t: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %w = bf16[8,64]{1,0} get-tuple-element(%t), index=1
  %fusion.1 = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) fusion(%w), kind=kCustom, calls=%start.1
  %fusion.2 = bf16[64,64]{1,0} fusion(%w), kind=kOutput, calls=%middle.1, backend_config={"estimated_cycles":"100"}
  %all-reduce.9 = f32[16]{0} all-reduce(%w), channel_id=6, replica_groups=[1,8]<=[8], to_apply=%add.1
  ROOT %tuple.1 = (s32[], bf16[8,64]{1,0}) tuple(%w, %w)
}

%condition.1 (t: (s32[], bf16[8,64])) -> pred[] {
  %t = (s32[], bf16[8,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %limit = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main.1 (a: bf16[8,64]) -> bf16[8,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %tuple.2 = (s32[], bf16[8,64]{1,0}) tuple(%zero, %a)
  %while.1 = (s32[], bf16[8,64]{1,0}) while(%tuple.2), condition=%condition.1, body=%body.1
  ROOT %copy.1 = bf16[8,64]{1,0} get-tuple-element(%while.1), index=1, backend_config={"estimated_cycles":"11"}
}
"""


def test_a_program_as_libtpu_writes_it():
    """An asynchronous gather stands in two fusions and is one; cycles and calls of a loop whose condition compares with
    7."""
    found = hlo.read(TPU_TEXT, {"fsdp": 8})
    assert [(row.kind, row.bytes, row.calls, row.asynchronous) for row in found.collectives] == [
        ("all-gather", 64 * 64 * 2 * 7 // 8, 7, True), ("all-reduce", round(16 * 4 * 2 * 7 / 8), 7, False)]
    assert found.cycles == 7 * 100 + 11


def test_the_whole_step_as_arithmetic_and_compiler_have_it():
    """Arguments of the compiled train step on 8 fake devices = state and batch by arithmetic; gathers over fsdp are
    there."""
    job = job_of("tiny")
    config = replace(job.config, mesh=configs.Mesh(data=2, fsdp=4), model=replace(job.config.model, kernel="reference"))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4}, jax.devices()[:8])
    done = compiled.lower(config, mesh).compile()
    used = memory.memory(job._replace(config=config), dict(mesh.shape), "reference", "gpu")
    assert done.memory_analysis().argument_size_in_bytes == pytest.approx(used.state + used.batch, abs=8)
    found = hlo.read(done.as_text(), dict(mesh.shape))
    assert ("all-gather", ("fsdp",)) in {(row.kind, row.axes) for row in found.collectives}


def test_a_step_compiled_for_a_pod_that_is_not_here(capsys):
    pytest.importorskip("libtpu", reason="pip install 'gpt_jax[plan]'")
    command.main(["--config", str(CONFIGS / "tiny.py"), "--topology=v5e:2x2", "--compile", "--json",
                  "--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.model.dtype=bfloat16"])
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["compiled"]["peak"] > found["compiled"]["argument"] > 0
    assert found["schedule"]["by_cycles"] and found["compiled"]["program"]["collectives"]


def test_gradients_on_a_tpu_without_a_tensor_axis():
    """Summed whole over all devices of a slice, as libtpu does; over slices each device's part."""
    job = changed(llama(), train=dict(batch_size=128, accumulate=1), mesh=dict(fsdp=64, dcn_data=2))
    layers, table = MATRICES - 2 * 128_256 * 4096 + 64 * 4096, 128_256 * 4096
    whole = 2 * (layers + 8 * table) + 4 * table
    sums = {flow.axis: flow.bytes for flow in traffic.flows(job, ONE | {"data": 2, "fsdp": 64}, "tpu")
            if flow.what == "gradients summed"}
    assert sums == pytest.approx({"fsdp": 2 * 63 / 64 * whole, "data": whole / 64}, rel=1e-4)


def test_flops_of_a_matmul_that_libtpu_writes_as_a_convolution():
    """13 matrices 8 x 16 times 16 x 32, the 13 as a dilated spatial dim."""
    text = """ENTRY %main.1 (a: bf16[13,8,16], b: bf16[13,16,32]) -> bf16[13,8,32] {
  %a = bf16[13,8,16]{2,1,0} parameter(0)
  %b = bf16[13,16,32]{2,1,0} parameter(1)
  ROOT %c = bf16[13,8,32]{2,1,0} convolution(%a, %b), window={size=13 stride=12 lhs_dilate=13}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.read(text, {"fsdp": 1}).matmul_flops == 2 * 13 * 8 * 16 * 32
