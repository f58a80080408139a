"""A plan as plain data, for JSON; everything in bytes and seconds."""

from dataclasses import asdict

from gpt_jax.hardware import choose_xla_options
from gpt_jax.plan.command_line import describe_replaced
from gpt_jax.plan.estimate import Estimate
from gpt_jax.plan.plan import Plan
from gpt_jax.plan.search import Candidate, list_overrides
from gpt_jax.plan.totals import list_uncounted, remat_bytes, step_flops
from gpt_jax.plan.wording import format_verdict


def make_data(plan: Plan) -> dict:
    """Returns the report of a plan."""
    config = plan.job.config
    chip = plan.topology.chip
    best = plan.best
    full, causal = step_flops(plan.job)

    data: dict = {}
    if plan.ranking:
        data["search"] = [_rank_data(plan, candidate) for candidate in plan.ranking]
    data |= {
        "topology": str(plan.topology),
        "devices": plan.topology.devices,
        "mesh": best.estimate.shape,
        "zero": config.mesh.zero,
        "remat": config.compute.remat,
        "accumulate": config.train.accumulate,
        "kernel": best.estimate.kernel,
        "compiler_options": choose_xla_options(
            chip.platform, chip.kind, config.compute.compiler_options
        ),
        "parameters": plan.job.parameters,
        "step_flops": {"full_map": full, "causal": causal},
        "arithmetic": _estimate_data(plan, best.estimate),
        "run": plan.horizon._asdict(),
        "notes": [
            *plan.notes,
            *list_uncounted(config, plan.topology),
            *describe_replaced(plan.replaced),
        ],
    }

    if best.compiled:
        data["compiled"] = best.compiled
        data["schedule"] = best.schedule._asdict() if best.schedule else None
    if plan.command:
        data["command"] = plan.command
    data |= {
        "by": "compiler" if best.compiled else "arithmetic",
        "fits": not plan.problems,
        "verdict": plan.verdict,
        "problems": plan.problems,
    }
    if plan.advice:
        offers = [list_overrides(plan.base, offer.config) for offer in plan.advice.offers]
        data["would_fit"] = offers
        if plan.advice.reason:
            data["advice"] = plan.advice.reason
    return data


def _rank_data(plan: Plan, candidate: Candidate) -> dict:
    return {
        "overrides": list_overrides(plan.base, candidate.config),
        "step_seconds": candidate.estimate.step,
        "mfu_causal": candidate.estimate.mfu_causal,
        "peak": candidate.estimate.memory.peak,
    }


def _estimate_data(plan: Plan, estimate: Estimate) -> dict:
    peak = estimate.memory.peak
    return {
        "memory": estimate.memory.list_parts() | {"peak": peak, "limit": plan.topology.chip.memory},
        "host_memory": asdict(estimate.memory.host),
        "activations_by_remat": remat_bytes(plan.job, plan.topology, estimate),
        "step_seconds": estimate.step,
        "bound_by": estimate.bound,
        "mfu_full": estimate.mfu_full,
        "mfu_causal": estimate.mfu_causal,
        "terms": {
            "matmuls": estimate.matmuls,
            "passes": estimate.passes,
            "hidden": estimate.hidden,
            "open": estimate.open,
            "update": estimate.update,
            "bubble": estimate.bubble,
        },
        "flows": [
            flow._asdict() | {"link": link.name, "speed": link.speed}
            for flow, link in estimate.flows
        ],
        "verdict": format_verdict(peak, plan.topology),
    }
