"""A plan as lines for people, and as plain data (called by commands/plan.py)."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.hardware import GIB
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.memory import memory
from gpt_jax.plan.program.collectives import Collective
from gpt_jax.plan.roofline import Estimate, estimate_job, format_verdict
from gpt_jax.plan.search import MARGIN, REMATS, Found, fitting, list_overrides, meshes, standing
from gpt_jax.plan.topology import Topology
from gpt_jax.run import format_count


class Horizon(NamedTuple):
    """What a whole run comes to. `epochs` is None when nobody said how many tokens there are;
    `by`: whose time of a step the days are, compiler or arithmetic."""

    tokens_per_step: int
    tokens: int
    tokens_per_parameter: float
    epochs: float | None
    days: float
    by: str
    checkpoint_bytes: int
    checkpoint_seconds: float


def stored_bytes(job: PlanJob) -> int:
    """Of a checkpoint: the whole state."""
    return sum(size * array.itemsize for array, size in job.state.items())


def estimate_horizon(
    job: PlanJob, topology: Topology, step: float, by: str, data_tokens: int, host_bandwidth: float
) -> Horizon:
    """`step`: seconds, `by` whom; `host_bandwidth`: bytes a second that one host writes to
    storage."""
    train = job.config.train
    tokens = train.batch_size * train.seq_len
    stored = stored_bytes(job)
    return Horizon(
        tokens,
        tokens * train.steps,
        tokens * train.steps / job.parameters,
        tokens * train.steps / data_tokens if data_tokens else None,
        step * train.steps / 86_400,
        by,
        stored,
        stored / (topology.hosts * host_bandwidth),
    )


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1024:.1f} KiB"


def format_seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if value >= scale:
            return f"{value / scale:.{2 if unit == 's' else 1}f} {unit}"
    return f"{value * 1e6:.3g} us" if value else "0 s"


def format_mesh(shape: dict[str, int], zero: int = 3) -> str:
    """ "data 2 x fsdp 4", and with which `zero` where it is not 3 and some axis could cut the
    weights."""
    cut = zero == 3 or all(shape[axis] == 1 for axis in configs.FSDP_AXES)
    return (" x ".join(f"{axis} {n}" for axis, n in shape.items() if n > 1) or "one device") + (
        "" if cut else f", zero {zero}"
    )


def format_head(job: PlanJob, topology: Topology, seen: Estimate) -> list[str]:
    config, chip = job.config, topology.chip
    return [
        f"{topology}: {topology.devices} {chip.kind} devices on {topology.hosts} hosts, "
        f"{topology.peak / 1e12:,.1f} TFLOP/s dense bf16 and {chip.memory / GIB:.1f} GiB each",
        f"mesh: {format_mesh(seen.shape)}; zero {config.mesh.zero}, remat {config.compute.remat}, "
        f"{format_count(config.train.accumulate, 'microbatch')}, attention kernel {seen.kernel} ({seen.reason})",
        f"model: {job.parameters:,} parameters, {job.matmul_params:,} multiplied; "
        f"{job.full_flops / 1e9:,.3g} GFLOP a token and {step_flops(job)[0] / 1e15:,.3g} PFLOP a step (full map; causal "
        f"{job.causal_flops / 1e9:,.3g} and {step_flops(job)[1] / 1e15:,.3g})",
    ]


def step_flops(job: PlanJob) -> tuple[float, float]:
    """The model's in a step on all devices, (full attention map, causal)."""
    tokens = job.config.train.batch_size * job.config.train.seq_len
    return job.full_flops * tokens, job.causal_flops * tokens


def by_remat(job: PlanJob, topology: Topology, seen: Estimate) -> dict[str, float]:
    """Bytes of activations on a device under each remat policy that a search tries."""

    def with_remat(name):
        return job._replace(
            config=replace(job.config, compute=replace(job.config.compute, remat=name))
        )

    return {
        name: memory(with_remat(name), seen.shape, seen.kernel, topology.chip.platform).activations
        for name in REMATS
    }


def list_uncounted(config: configs.Config) -> list[str]:
    """What neither arithmetic nor compiler counts of this config."""
    return [
        "config.compute.remat = 'offload': its copies to the host's memory and back are not in the step's time"
    ] * (config.compute.remat == "offload")


def format_arithmetic(job: PlanJob, topology: Topology, seen: Estimate) -> list[str]:
    """The arithmetic stage's lines."""
    rows = [
        f"  {name:<12} {size(value):>12}" for name, value in seen.memory.rows().items() if value
    ]
    flows = [
        f"  {flow.axis:<9} {flow.what:<30} {size(flow.bytes):>12} over {link.name:<8} {link.speed / 1e9:6.1f} "
        f"GB/s {format_seconds(flow.bytes / link.speed):>10}{'  behind matmuls' if flow.hidden else ''}"
        for flow, link in seen.flows
    ]
    remats = ", ".join(
        f"{name} {size(value)}" for name, value in by_remat(job, topology, seen).items()
    )
    return [
        "memory of a device, by arithmetic (of working and logits the larger counts: they are not there at once)",
        *rows,
        f"  activations by remat: {remats}",
        f"  {format_verdict(seen.memory.peak, topology)}",
        "sent by a device in a step",
        *(flows or ["  nothing"]),
        f"step, by arithmetic: {format_seconds(seen.step)} = matmuls {format_seconds(seen.matmuls)} + passes over memory "
        f"{format_seconds(seen.passes)}, or links behind them {format_seconds(max(seen.hidden.values(), default=0))}; "
        f"+ open links {format_seconds(sum(seen.open.values()))} + update {format_seconds(seen.update)}; "
        f"pipeline bubble {seen.bubble:.0%}",
        f"bound by {seen.bound}; estimated MFU {seen.mfu_full:.1%} (full map), {seen.mfu_causal:.1%} (causal)",
    ]


def explain_nothing_fits(job: PlanJob, topology: Topology) -> str:
    """Why no mesh, remat policy or accumulation makes the job fit."""
    if not any(fitting(job, topology, float("inf"))):
        plain = replace(job.config, mesh=configs.Mesh(data=1, fsdp=-1, dcn_data=topology.slices))
        first, *_ = estimate_job(job._replace(config=plain), topology).problems
        return f"no mesh of {topology} runs it; with all devices on fsdp {first}"
    least = min(standing(job, topology, mesh) for mesh in meshes(job.config, topology))
    enough = (
        "alone is too much; take more devices"
        if least > MARGIN * topology.chip.memory
        else (
            "leaves too little for the smallest microbatch; lower config.train.seq_len or config.train.batch_size, or take more "
            "devices"
        )
    )
    return (
        f"nothing fits {topology}, whose devices have {size(topology.chip.memory)}: the state and its gradients, cut over "
        f"all of them, are {size(least)} each, which {enough}"
    )


def format_horizon(ahead: Horizon) -> list[str]:
    epochs = "" if ahead.epochs is None else f", {ahead.epochs:.2f} epochs"
    return [
        f"run: {ahead.tokens_per_step:,} tokens a step, {ahead.tokens:.3g} in all "
        f"({ahead.tokens_per_parameter:.1f} a parameter{epochs}), {ahead.days:.1f} days by "
        f"the {'compiled step' if ahead.by == 'compiler' else 'arithmetic'}",
        f"checkpoint: {size(ahead.checkpoint_bytes)}, written in {format_seconds(ahead.checkpoint_seconds)}",
    ]


def _collective(row: Collective) -> str:
    return (
        f"  {row.kind:<20} {'+'.join(row.axes):<14} {size(row.bytes):>12} x {row.calls:<7,} = "
        f"{size(row.bytes * row.calls):>12}{'  asynchronous' if row.asynchronous else ''}"
    )


def format_compiled(
    topology: Topology, done: dict, time: dict | None, expected: float, most: int = 12
) -> list[str]:
    """`done`: compiled.Compiled as a dict; `time`: schedule.Schedule as one; `expected`: the
    arithmetic's peak."""
    if done["refusal"]:
        return [f"compiled: refused after {done['seconds']:.0f} s: {done['refusal']}"]
    rows = [Collective(**row) for row in done["program"]["collectives"]]
    left = rows[most:]
    source = "the compiler's cycles" if time["by_cycles"] else "the arithmetic"
    return [
        f"compiled in {done['seconds']:.0f} s: argument {size(done['argument'])}, output {size(done['output'])} "
        f"(alias {size(done['alias'])}), temporary {size(done['temporary'])}; arithmetic said "
        f"{expected / done['peak'] - 1:+.0%}",
        f"  {format_verdict(done['peak'], topology)}",
        "collectives of the program, sent by a device in a step",
        *map(_collective, rows[:most]),
        *(
            [f"  and {len(left)} more kinds, {size(sum(row.bytes * row.calls for row in left))}"]
            if left
            else []
        ),
        f"step, compiled: {format_seconds(time['step'])} = computing {format_seconds(time['computing'])} ({source}) + kernels "
        f"without cycles {format_seconds(time['kernels'])}, or asynchronous collectives {format_seconds(time['hidden'])}; + others "
        f"{format_seconds(time['open'])}{f' + update {format_seconds(update)}' if (update := time['update']) else ''}; "
        f"matmul FLOPs of the program {time['flops_ratio']:.2f} x the model's",
        f"estimated MFU {time['mfu_full']:.1%} (full map), {time['mfu_causal']:.1%} (causal)",
    ]


def format_ranking(found: list[Found]) -> list[str]:
    """A table of what was found, best first."""
    lines = [
        f"{'':>3} {'step':>9} {'MFU full':>8} {'causal':>7} {'peak GiB':>8}  {'mesh':<44} remat  microbatches"
    ]
    for place, (one, seen) in enumerate(found, 1):
        lines.append(
            f"{place:>3} {format_seconds(seen.step):>9} {seen.mfu_full:>8.1%} {seen.mfu_causal:>7.1%} "
            f"{seen.memory.peak / GIB:>8.1f}  {format_mesh(seen.shape, one.mesh.zero):<44} {one.compute.remat:<6} "
            f"{one.train.accumulate}"
        )
    return lines


def ranking_as_data(base: configs.Config, found: list[Found]) -> list[dict]:
    return [
        {
            "overrides": list_overrides(base, one),
            "step_seconds": seen.step,
            "mfu_causal": seen.mfu_causal,
            "peak": seen.memory.peak,
        }
        for one, seen in found
    ]


def format_command(spec: str, overridden: list[str]) -> str:
    """The shell's command that trains the config of `spec` with these overrides."""
    path, _, variant = spec.partition(":")
    name = (
        f"{Path(path).stem}-{variant.strip('/').replace('/', '-')}" if variant else Path(path).stem
    )
    return shlex.join(
        ["gpt-jax", "train", f"--config={spec}", f"--workdir=runs/{name}", *overridden]
    )


def job_as_data(job: PlanJob, topology: Topology, seen: Estimate, ahead: Horizon) -> dict:
    """The job, and under `arithmetic` that stage, as plain data; bytes and seconds."""
    full, causal = step_flops(job)
    stage = {
        "memory": seen.memory.rows() | {"peak": seen.memory.peak, "limit": topology.chip.memory},
        "activations_by_remat": by_remat(job, topology, seen),
        "step_seconds": seen.step,
        "bound_by": seen.bound,
        "mfu_full": seen.mfu_full,
        "mfu_causal": seen.mfu_causal,
        "terms": {
            "matmuls": seen.matmuls,
            "passes": seen.passes,
            "hidden": seen.hidden,
            "open": seen.open,
            "update": seen.update,
            "bubble": seen.bubble,
        },
        "flows": [
            flow._asdict() | {"link": link.name, "speed": link.speed} for flow, link in seen.flows
        ],
        "verdict": format_verdict(seen.memory.peak, topology),
    }
    config = job.config
    return {
        "topology": str(topology),
        "devices": topology.devices,
        "mesh": seen.shape,
        "zero": config.mesh.zero,
        "remat": config.compute.remat,
        "accumulate": config.train.accumulate,
        "kernel": seen.kernel,
        "parameters": job.parameters,
        "step_flops": {"full_map": full, "causal": causal},
        "arithmetic": stage,
        "run": ahead._asdict(),
    }
