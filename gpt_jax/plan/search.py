"""Meshes, remat policies and microbatches by the hundred, ranked by the arithmetic (called by
commands/plan.py)."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.plan.job import PlanJob, device_bytes
from gpt_jax.plan.memory import memory
from gpt_jax.plan.roofline import Estimate, estimate_job
from gpt_jax.plan.topology import Topology

REMATS = (
    "none",
    "dots",
    "block",
)  # offload needs the host's links, which the arithmetic leaves out
LARGEST = {"tensor": 16, "context": 8, "pipeline": 8}  # beyond these the open flows always lose
# The fields that `meshes` and `variants` set. (eval.batch_size follows accumulation only where it
# has to.)
SEARCHED = (
    "mesh.",
    "compute.remat",
    "compute.shard_sequence",
    "compute.pipeline_",
    "train.accumulate",
)
# of the memory: arithmetic and compiler mostly differ by less than a tenth, see benchmarks/plan.py
MARGIN = 0.92
MOST = 1 << 20  # microbatches of a step: a mistake rather than a run, beyond
# of the arithmetic's peak: above it is what the compiler will refuse like one that it has refused
CLOSE = 0.97


class Found(NamedTuple):
    config: configs.Config
    estimate: Estimate


@cache
def divisors(number: int, most: int = MOST) -> tuple[int, ...]:
    """Those up to `most`, in order."""
    small = [n for n in range(1, min(math.isqrt(number), most) + 1) if number % n == 0]
    return tuple(sorted({*small, *(number // n for n in small if number // n <= most)}))


def meshes(config: configs.Config, topology: Topology) -> Iterator[configs.Mesh]:
    """Meshes that use every device. Slices hold copies (data), the rest of the axes stays inside
    a slice. With the config's own `zero` and, where that cuts anything, with 3."""
    model, inside = config.model, topology.devices // topology.slices
    moe = any(ffn == "moe" for _, ffn in model.pattern)
    for tensor in divisors(
        math.gcd(inside, math.gcd(model.heads, model.kv_heads)), LARGEST["tensor"]
    ):
        for context in divisors(inside // tensor, LARGEST["context"]):
            for pipeline in divisors(inside // tensor // context, LARGEST["pipeline"]):
                if context > 1 and pipeline > 1:
                    continue
                left = inside // tensor // context // pipeline
                for expert in divisors(math.gcd(left, model.experts)) if moe else (1,):
                    for fsdp in divisors(left // expert):
                        mesh = configs.Mesh(
                            pipeline=pipeline,
                            data=left // expert // fsdp,
                            fsdp=fsdp,
                            expert=expert,
                            context=context,
                            tensor=tensor,
                            dcn_data=topology.slices,
                            zero=config.mesh.zero,
                        )
                        yield mesh
                        if mesh.zero != 3 and fsdp * expert * context > 1:
                            yield replace(mesh, zero=3)


def _rows(mesh: configs.Mesh) -> int:
    return math.prod(
        getattr(mesh, axis) * getattr(mesh, f"dcn_{axis}") for axis in configs.BATCH_AXES
    )


def variants(config: configs.Config, mesh: configs.Mesh) -> Iterator[list[configs.Config]]:
    """For each remat policy (and, in a pipeline, number of microbatches and rounds) the config
    with more and more accumulation: the first that fits is the fastest of its list."""
    train, rows = config.train, _rows(mesh)
    shapes = [(1, 0)]
    if mesh.pipeline > 1:
        shapes = [(rounds, times * mesh.pipeline) for rounds in (1, 2) for times in (1, 2, 4)]
    for remat in REMATS:
        for rounds, microbatches in shapes:
            compute = replace(
                config.compute,
                remat=remat,
                shard_sequence=mesh.tensor > 1,
                pipeline_rounds=rounds,
                pipeline_microbatches=microbatches,
            )
            unit = rows // mesh.pipeline * microbatches if microbatches else rows
            made = []
            for accumulate in (
                divisors(train.batch_size // unit) if train.batch_size % unit == 0 else ()
            ):
                held = (
                    config.eval.batch_size
                    if config.eval.batch_size % unit == 0
                    else train.batch_size // accumulate
                )
                made.append(
                    replace(
                        config,
                        compute=compute,
                        mesh=mesh,
                        train=replace(train, accumulate=accumulate),
                        eval=replace(config.eval, batch_size=held),
                    )
                )
            if made:
                yield made


def standing(job: PlanJob, topology: Topology, mesh: configs.Mesh) -> float:
    """Bytes of a device that no policy saves: the state, and gradients as large as the
    parameters."""
    shape = configs.mesh_shape(mesh, topology.devices)
    return sum(
        device_bytes(job, shape, part, mesh.zero) for part in ("params", "params", "opt", "ema")
    )


def _first(
    job: PlanJob, topology: Topology, several: list[configs.Config], limit: float
) -> Found | None:
    """The first of `several` (see `variants`) that fits. Peaks fall with accumulation, but from
    1 to 2, where a second sum of gradients comes in."""
    first = estimate_job(job._replace(config=several[0]), topology)
    if first.problems or first.memory.peak <= limit:
        return None if first.problems else Found(several[0], first)

    def fits(config: configs.Config) -> bool:
        return (
            memory(
                job._replace(config=config), first.shape, first.kernel, topology.chip.platform
            ).peak
            <= limit
        )

    place = 1 + bisect_left(several[1:], True, key=fits)
    return (
        Found(several[place], estimate_job(job._replace(config=several[place]), topology))
        if place < len(several)
        else None
    )


def fitting(job: PlanJob, topology: Topology, limit: float) -> Iterator[Found]:
    """Everything that runs and whose peak by the arithmetic is at most `limit` bytes."""
    for mesh in meshes(job.config, topology):
        if standing(job, topology, mesh) <= limit:
            yield from filter(
                None,
                (_first(job, topology, several, limit) for several in variants(job.config, mesh)),
            )


def search_meshes(job: PlanJob, topology: Topology, limit: float | None = None) -> list[Found]:
    """What fits `limit` bytes (MARGIN of the memory), fastest first."""
    return sorted(
        fitting(job, topology, MARGIN * topology.chip.memory if limit is None else limit),
        key=_order,
    )


def _order(one: Found) -> tuple:
    """By time to a thousandth; of equals the plainest mesh, then the emptiest memory."""
    axes = sum(size > 1 for size in one.estimate.shape.values())
    return float(f"{one.estimate.step:.3g}"), axes, one.estimate.memory.peak


def list_overrides(old: configs.Config, new: configs.Config) -> list[str]:
    """What to add to a command line to come from one config to the other."""
    return [
        f"--config.{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, _, value, _ in configs.changes(old, new)
    ]


def is_searched(given: str) -> bool:
    """Whether an override, as on a command line, is of a field that a search sets."""
    return given.removeprefix("--config.").startswith(SEARCHED)


def lower_limit(topology: Topology, refused: list[tuple[float, float]]) -> float:
    """The arithmetic's peak that can be trusted to fit after what the compiler refused: (peak by
    the arithmetic, by the compiler; 0 where it did not say) of each."""
    limits = [MARGIN * topology.chip.memory]
    for expected, peak in refused:
        limits.append(limits[0] * expected / peak if peak else CLOSE * expected)
    return min(limits)


def find_advice(
    job: PlanJob, topology: Topology, limit: float | None = None, count: int = 3
) -> list[Found]:
    """What fits (see `search`) and is not the config itself, with the fewest changes to it
    first, and of those the fastest."""
    offers = [
        one for one in search_meshes(job, topology, limit) if list_overrides(job.config, one.config)
    ]
    return sorted(
        offers, key=lambda one: (len(list_overrides(job.config, one.config)), _order(one))
    )[:count]
