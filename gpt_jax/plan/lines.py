"""A plan as lines for people."""

import shlex
from dataclasses import asdict

from gpt_jax import config as configs
from gpt_jax.hardware import GIB, choose_xla_options, describe_xla_options
from gpt_jax.plan.command_line import describe_replaced
from gpt_jax.plan.estimate import Estimate
from gpt_jax.plan.horizon import Horizon
from gpt_jax.plan.job import PlanJob
from gpt_jax.plan.links import Link
from gpt_jax.plan.memory import HostMemory
from gpt_jax.plan.plan import Plan
from gpt_jax.plan.program.collectives import Collective
from gpt_jax.plan.schedule import Schedule
from gpt_jax.plan.search import Candidate, list_overrides
from gpt_jax.plan.topology import Topology
from gpt_jax.plan.totals import list_uncounted, remat_bytes, step_flops
from gpt_jax.plan.traffic import Flow
from gpt_jax.plan.trial import Trial
from gpt_jax.plan.wording import format_mesh, format_seconds, format_size, format_verdict
from gpt_jax.run import format_count

MOST_COLLECTIVES = 12  # Kinds of collectives that are shown.
REMAT_WIDTH = 26  # Characters of the longest policy that a search tries.


def write_lines(plan: Plan) -> list[str]:
    """Returns the report of a plan."""
    estimate = plan.best.estimate
    lines = [*plan.notes]
    if plan.ranking:
        lines.append(f"{plan.count} combinations fit; the best by arithmetic")
        lines += format_ranking(plan.ranking)
        compiled = [trial for trial in plan.trials if trial.compiled]
        for place, trial in enumerate(compiled, 1):
            lines.append(f"compiled {place}: {format_trial(trial)}")

    lines += format_head(plan.job, plan.topology, estimate)
    lines += format_arithmetic(plan.job, plan.topology, estimate)
    if plan.best.compiled:
        lines += format_compiled(plan.best, plan.topology)
    lines += list_uncounted(plan.job.config, plan.topology)
    lines += format_horizon(plan.horizon)

    lines += describe_replaced(plan.replaced)
    if plan.command:
        lines.append(f"best: {plan.command}")
    lines += [f"problem: {problem}" for problem in plan.problems]
    if plan.advice:
        lines += [format_offer(plan.base, offer, plan.topology) for offer in plan.advice.offers]
        if plan.advice.reason:
            lines.append(f"no mesh, remat or accumulation helps: {plan.advice.reason}")
    return lines


def format_ranking(ranking: list[Candidate]) -> list[str]:
    """Returns a table of candidates."""
    lines = [
        f"{'':>3} {'step':>9} {'MFU full':>8} {'causal':>7} {'peak GiB':>8}  {'mesh':<44} "
        f"{'remat':<{REMAT_WIDTH}} microbatches"
    ]
    for place, (config, estimate) in enumerate(ranking, 1):
        mesh = format_mesh(estimate.shape, config.mesh.zero)
        lines.append(
            f"{place:>3} {format_seconds(estimate.step):>9} {estimate.mfu_full:>8.1%} "
            f"{estimate.mfu_causal:>7.1%} {estimate.memory.peak / GIB:>8.1f}  {mesh:<44} "
            f"{configs.describe_remat(config.compute):<{REMAT_WIDTH}} {config.train.accumulate}"
        )
    return lines


def format_trial(trial: Trial) -> str:
    """Returns a line about a config that was compiled."""
    assert trial.compiled
    mesh = format_mesh(trial.estimate.shape, trial.config.mesh.zero)
    result = trial.refusal
    if not result:
        result = (
            f"{format_seconds(trial.step)} a step, peak {trial.compiled['peak'] / GIB:.1f} GiB, "
            f"{trial.compiled['seconds']:.0f} s"
        )
    return f"{mesh}, remat {configs.describe_remat(trial.config.compute)}: {result}"


def format_head(job: PlanJob, topology: Topology, estimate: Estimate) -> list[str]:
    """Returns lines about the machine, the mesh, the model and the compiler's options."""
    config = job.config
    chip = topology.chip
    options = choose_xla_options(chip.platform, chip.kind, config.compute.compiler_options)
    full, causal = step_flops(job)
    microbatches = format_count(config.train.accumulate, "microbatch")
    return [
        f"{topology}: {topology.devices} {chip.kind} devices on {topology.hosts} hosts, "
        f"{topology.peak / 1e12:,.1f} TFLOP/s dense bf16 and {chip.memory / GIB:.1f} GiB each",
        f"mesh: {format_mesh(estimate.shape)}; zero {config.mesh.zero}, "
        f"remat {configs.describe_remat(config.compute)}, {microbatches}, "
        f"attention kernel {estimate.kernel} ({estimate.reason})",
        f"model: {job.parameters:,} parameters, {job.matmul_params:,} multiplied; "
        f"{job.full_flops / 1e9:,.3g} GFLOP a token and {full / 1e15:,.3g} PFLOP a step "
        f"(full map; causal {job.causal_flops / 1e9:,.3g} and {causal / 1e15:,.3g})",
        describe_xla_options(chip.platform, chip.kind, options),
    ]


def format_arithmetic(job: PlanJob, topology: Topology, estimate: Estimate) -> list[str]:
    """Returns the lines of the arithmetic: memory, flows and the step."""
    parts = estimate.memory.list_parts()
    remats = remat_bytes(job, topology, estimate)
    policies = ", ".join(f"{name} {format_size(value)}" for name, value in remats.items())
    flows = [_format_flow(flow, link) for flow, link in estimate.flows]
    links = format_seconds(max(estimate.hidden.values(), default=0))
    return [
        "memory of a device, by arithmetic "
        "(working and logits never coexist; only the larger is counted)",
        *(f"  {name:<12} {format_size(value):>12}" for name, value in parts.items() if value),
        f"  activations by remat: {policies}",
        *format_host(estimate.memory.host),
        f"  {format_verdict(estimate.memory.peak, topology)}",
        "sent by a device in a step",
        *(flows or ["  nothing"]),
        f"step, by arithmetic: {format_seconds(estimate.step)} = "
        f"matmuls {format_seconds(estimate.matmuls)} + "
        f"passes over memory {format_seconds(estimate.passes)}, or links behind them {links}; "
        f"+ open links {format_seconds(sum(estimate.open.values()))} + "
        f"update {format_seconds(estimate.update)}; pipeline bubble {estimate.bubble:.0%}",
        f"bound by {estimate.bound}; estimated MFU {estimate.mfu_full:.1%} (full map), "
        f"{estimate.mfu_causal:.1%} (causal)",
    ]


def format_host(host: HostMemory) -> list[str]:
    """Returns a line about what a device has in the memory of its host, if it has anything."""
    parts = [f"{name} {format_size(value)}" for name, value in asdict(host).items() if value]
    return [f"  on the host, for each device: {', '.join(parts)}"] if parts else []


def _format_flow(flow: Flow, link: Link) -> str:
    behind = "  behind matmuls" if flow.hidden else ""
    seconds = format_seconds(flow.bytes / link.speed)
    return (
        f"  {flow.axis:<9} {flow.what:<30} {format_size(flow.bytes):>12} over {link.name:<8} "
        f"{link.speed / 1e9:6.1f} GB/s {seconds:>10}{behind}"
    )


def format_compiled(trial: Trial, topology: Topology) -> list[str]:
    """Returns the lines of the compiler about a config that was compiled."""
    compiled = trial.compiled
    assert compiled
    if trial.refusal or not trial.schedule:
        return [f"compiled: refused after {compiled['seconds']:.0f} s: {trial.refusal}"]

    arithmetic = trial.estimate.memory.peak / compiled["peak"] - 1
    rows = [Collective(**row) for row in compiled["program"]["collectives"]]
    lines = [
        f"compiled in {compiled['seconds']:.0f} s: argument {format_size(compiled['argument'])}, "
        f"output {format_size(compiled['output'])} (alias {format_size(compiled['alias'])}), "
        f"temporary {format_size(compiled['temporary'])}; arithmetic said {arithmetic:+.0%}",
        *_format_compiled_host(compiled),
        f"  {format_verdict(compiled['peak'], topology)}",
        "collectives of the program, sent by a device in a step",
        *map(_format_collective, rows[:MOST_COLLECTIVES]),
    ]
    others = rows[MOST_COLLECTIVES:]
    if others:
        total = format_size(sum(row.bytes * row.calls for row in others))
        lines.append(f"  and {len(others)} more kinds, {total}")
    return [*lines, *_format_work(compiled["program"], topology), *_format_schedule(trial.schedule)]


def _format_compiled_host(compiled: dict) -> list[str]:
    if not compiled["host_argument"] + compiled["host_temporary"]:
        return []
    return [
        f"  on the host: argument {format_size(compiled['host_argument'])}, "
        f"temporary {format_size(compiled['host_temporary'])}"
    ]


def _format_collective(row: Collective) -> str:
    asynchronous = "  asynchronous" if row.asynchronous else ""
    return (
        f"  {row.kind:<20} {'+'.join(row.axes):<14} {format_size(row.bytes):>12} x "
        f"{row.calls:<7,} = {format_size(row.bytes * row.calls):>12}{asynchronous}"
    )


def _format_work(program: dict, topology: Topology) -> list[str]:
    """Returns a line about what the compiler's cycles are spent on, if it writes any."""
    if not program["cycles"]:
        return []
    seconds = {kind: cycles / topology.chip.clock for kind, cycles in program["work"].items()}
    parts = [f"{kind} {format_seconds(time)}" for kind, time in seconds.items()]
    if seconds["matmuls"]:
        part = program["matmul_flops"] / seconds["matmuls"] / topology.peak
        parts[0] += f" at {part:.1%} of the peak"
    return [f"cycles by kind: {', '.join(parts)}"]


def _format_schedule(schedule: Schedule) -> list[str]:
    source = "the compiler's cycles" if schedule.by_cycles else "the arithmetic"
    update = f" + update {format_seconds(schedule.update)}" if schedule.update else ""
    return [
        f"step, compiled: {format_seconds(schedule.step)} = "
        f"computing {format_seconds(schedule.computing)} ({source}) + "
        f"kernels without cycles {format_seconds(schedule.kernels)}, "
        f"or asynchronous collectives {format_seconds(schedule.hidden)}; "
        f"+ others {format_seconds(schedule.open)}{update}; "
        f"matmul FLOPs of the program {schedule.flops_ratio:.2f} x the model's",
        f"estimated MFU {schedule.mfu_full:.1%} (full map), {schedule.mfu_causal:.1%} (causal)",
    ]


def format_horizon(horizon: Horizon) -> list[str]:
    """Returns the lines about the whole run and its checkpoints."""
    epochs = "" if horizon.epochs is None else f", {horizon.epochs:.2f} epochs"
    by = "compiled step" if horizon.by == "compiler" else "arithmetic"
    return [
        f"run: {horizon.tokens_per_step:,} tokens a step, {horizon.tokens:.3g} in all "
        f"({horizon.tokens_per_parameter:.1f} a parameter{epochs}), "
        f"{horizon.days:.1f} days by the {by}",
        f"checkpoint: {format_size(horizon.checkpoint_bytes)}, "
        f"written in {format_seconds(horizon.checkpoint_seconds)}",
    ]


def format_offer(base: configs.Config, offer: Candidate, topology: Topology) -> str:
    """Returns a line about a change to `base` that would fit."""
    overrides = shlex.join(list_overrides(base, offer.config))
    step = format_seconds(offer.estimate.step)
    verdict = format_verdict(offer.estimate.memory.peak, topology)
    return f"would fit, by arithmetic: {overrides} ({step} a step, {verdict})"
