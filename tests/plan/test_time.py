"""Seconds of a step, by arithmetic and from a compiled program."""

from dataclasses import replace

import jax
import pytest
from plans import ONE, changed, job_of, llama, read_plan, run_plan

from gpt_jax import config as configs
from gpt_jax.plan import compiled, roofline
from gpt_jax.plan.estimate import estimate_job
from gpt_jax.plan.experts import count_exchange_places
from gpt_jax.plan.memory import estimate_memory, scores_bytes
from gpt_jax.plan.microbatch import split_microbatch
from gpt_jax.plan.program.program import read_program
from gpt_jax.plan.schedule import estimate_schedule
from gpt_jax.plan.topology import parse_topology
from gpt_jax.sharding.mesh import make_mesh

PROGRAM = dict(
    collectives=[], cycles=0, kernels={}, matmul_flops=0.0, turn_flops=0.0, grouped_flops=0.0
)


@pytest.mark.parametrize("name, slower", [("h100:8", 2), ("v5e:4x4", 1)])
def test_float32_takes_longer(name, slower):
    """Matmuls take twice as long on GPUs, and as long on TPUs.

    Between matmuls there are twice the bytes on both.
    """
    machine = parse_topology(name)
    shape = ONE | {"fsdp": machine.devices}
    half, full = (
        changed(
            llama(),
            mesh=dict(data=1, fsdp=machine.devices),
            compute=dict(dtype=dtype, kernel="xla"),
        )
        for dtype in ("bfloat16", "float32")
    )
    here = split_microbatch(half, shape)
    times = [roofline.compute_seconds(job, machine, "xla", shape, here) for job in (half, full)]
    assert times[1] == pytest.approx(slower * times[0])

    # Logits are in float32 in both.
    config = half.config
    logits = 4 * here.tokens * config.model.vocab * 4 * config.train.accumulate
    passes = [
        roofline.passes_seconds(job, machine, "splash", shape, here)
        - logits / machine.chip.bandwidth
        for job in (half, full)
    ]
    assert passes[1] == pytest.approx(2 * passes[0])


def test_chunks_of_the_loss_compute_nothing_again():
    machine = parse_topology("v5e:4x4")
    shape = ONE | {"fsdp": machine.devices}
    times = []
    for chunk in (1024, 0):
        job = changed(llama(), mesh=dict(data=1, fsdp=16), train=dict(loss_chunk=chunk))
        here = split_microbatch(job, shape)
        times.append(roofline.compute_seconds(job, machine, "splash", shape, here))
    assert times[0] == times[1]


def test_tokens_beyond_a_capacity_are_no_work_done():
    """A factor of 0.1 multiplies a tenth of the choices, and counts a tenth of them."""
    machine = parse_topology("v5p:4x4x4")
    tenth, whole = (
        estimate_job(
            job_of(
                "moe:8x7b",
                "--config.model.dispatch=capacity",
                "--config.data.document_mask=false",
                f"--config.model.capacity_factor={factor}",
            ),
            machine,
        ).mfu_full
        for factor in (0.1, 1.0)
    )

    assert 0 < tenth < whole < 1


def test_a_program_without_cycles_takes_the_arithmetic_s_time():
    machine = parse_topology("h100:8")
    job = changed(llama(), mesh=dict(data=1, fsdp=machine.devices))
    estimate = estimate_job(job, machine)
    schedule = estimate_schedule(job, machine, estimate.kernel, PROGRAM)
    assert schedule.update == estimate.update > 0
    assert schedule.step == pytest.approx(estimate.matmuls + estimate.passes + estimate.update)


def test_a_program_with_cycles_takes_them_the_update_included():
    machine = parse_topology("v5e:4x4")
    job = changed(llama(), mesh=dict(data=1, fsdp=machine.devices))
    schedule = estimate_schedule(job, machine, "splash", PROGRAM | {"cycles": 10**9})
    assert schedule.update == 0
    assert schedule.step == pytest.approx(10**9 / machine.chip.clock + schedule.kernels)


def test_grouped_matmuls_without_cycles_take_the_arithmetic_s_time():
    """Rows of the exchange's buffers that stay empty cost nothing."""
    machine = parse_topology("v5e:4x4")
    job = changed(job_of("moe:small"), mesh=dict(data=1, fsdp=8, expert=2))
    none, some = (
        estimate_schedule(job, machine, "splash", PROGRAM | {"cycles": 1, "grouped_flops": flops})
        for flops in (0.0, 1e15)
    )
    places = count_exchange_places(job.config.model, ONE | {"expert": 2})
    assert places > 1
    seconds = 1e15 / places / machine.peak / roofline.EFFICIENCY["tpu"]
    assert some.step - none.step == pytest.approx(seconds)
    assert some.flops_ratio > none.flops_ratio


def test_the_whole_step_as_arithmetic_and_compiler_have_it():
    """Arguments of the compiled train step on 8 fake devices are state and batch by arithmetic.

    The program gathers over fsdp.
    """
    job = job_of("tiny")
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices()[:8])
    compute = replace(job.config.compute, kernel="reference")
    config = replace(job.config, mesh=configs.Mesh(data=2, fsdp=4), compute=compute)
    program = compiled.lower_step(config, mesh).compile()

    job = job._replace(config=config)
    memory = estimate_memory(job, dict(mesh.shape), "reference", "gpu")
    arguments = program.memory_analysis().argument_size_in_bytes
    assert arguments == pytest.approx(memory.state + memory.batch, abs=8)

    collectives = read_program(program.as_text(), dict(mesh.shape)).collectives
    assert ("all-gather", ("fsdp",)) in {(row.kind, row.axes) for row in collectives}


@pytest.mark.parametrize("name", ["llama:8b", "moe:8x7b"])
def test_fp8_counts_the_linear_maps_of_blocks_at_its_own_peak(name):
    """Half of their time on an H200. A v5p emulates fp8 and gains nothing."""
    plain = job_of(name, "--config.mesh.fsdp=8", "--config.compute.dtype=bfloat16")
    narrow = changed(plain, compute=dict(matmul_dtype="fp8"))
    model = plain.config.model
    attention = 2 * model.embed * (model.heads + model.kv_heads) * model.head_dim
    dense = 3 * model.embed * model.mlp if name == "llama:8b" else 0
    matrices = model.layers * (attention + dense)
    assert roofline.count_fp8_params(narrow) == matrices
    assert roofline.count_fp8_params(plain) == 0

    shape = ONE | {"fsdp": 8}
    here = split_microbatch(plain, shape)
    repeats = 4 / 3 if plain.config.compute.remat == "block" else 1
    tokens = plain.config.train.batch_size * plain.config.train.seq_len / 8
    for machine, peak, fp8 in (("h200:8", 989e12, 1979e12), ("v5p:2x2x2", 459e12, None)):
        topology = parse_topology(machine)
        wide, less = (
            roofline.compute_seconds(job, topology, "reference", shape, here)
            for job in (plain, narrow)
        )
        part = roofline.EFFICIENCY[topology.chip.platform]
        saved = 1 / peak - 1 / fp8 if fp8 else 0
        assert wide - less == pytest.approx(
            tokens * 6 * matrices * repeats * saved / part, rel=1e-6
        )


def test_a_plan_says_how_it_counts_fp8(capsys):
    lines = {}
    for machine in ("h200:8", "v5p:2x2x2"):
        run_plan("llama:1b", machine, "--config.compute.matmul_dtype=fp8", "--json")
        lines[machine] = [note for note in read_plan(capsys)["notes"] if "fp8" in note]
    assert len(lines["h200:8"]) == 2 and "at the peak of fp8" in lines["h200:8"][-1]
    assert len(lines["v5p:2x2x2"]) == 3 and "emulates" in lines["v5p:2x2x2"][1]
    assert "at the peak of bfloat16" in lines["v5p:2x2x2"][-1]


def test_cudnn_gets_documents_as_a_map():
    """In packed rows it skips nothing, and two maps of a row are in memory. flash has none."""
    packed = llama()
    plain = changed(packed, data=dict(document_mask=False))
    assert packed.config.data.document_mask
    matmuls = 6 * packed.matmul_params
    assert roofline.attention_flops(packed, "cudnn") == packed.full_flops - matmuls
    for job, kernel in ((plain, "cudnn"), (plain, "flash"), (packed, "flash")):
        assert roofline.attention_flops(job, kernel) == packed.causal_flops - matmuls

    rows = 4
    seq_len = packed.config.train.seq_len
    maps = 2 * rows * seq_len * seq_len * 2  # bytes of bfloat16
    assert scores_bytes(packed, ONE, rows, "cudnn") == maps
    assert scores_bytes(packed, ONE, rows, "flash") == scores_bytes(plain, ONE, rows, "cudnn") == 0


def test_packed_rows_on_gpus_choose_flash():
    machine = parse_topology("h100:8")
    packed = estimate_job(changed(llama(), mesh=dict(data=1, fsdp=8)), machine)
    assert packed.kernel == "flash" and "has not been timed" in packed.reason
    plain = changed(llama(), mesh=dict(data=1, fsdp=8), data=dict(document_mask=False))
    assert estimate_job(plain, machine).kernel == "cudnn"
