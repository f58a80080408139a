"""Meshes, remat policies and microbatches by the hundred, ranked by the arithmetic."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from gpt_jax import config as configs
from gpt_jax.plan.estimate import Estimate, estimate_job
from gpt_jax.plan.job import PlanJob, device_bytes
from gpt_jax.plan.memory import estimate_memory
from gpt_jax.plan.topology import Topology

# Policies that are tried. `offload` needs the host's links, which the arithmetic leaves out.
REMATS = ("none", "dots", "block")
# What `names` keeps where it is tried, between `block` and `dots`. The kernel of attention then
# does not run again, and in the second row neither do the matmuls before it.
KEPT = (("attention",), ("q", "k", "v", "attention"))
# The largest sizes that are tried. Beyond these the open flows always lose.
LARGEST = {"tensor": 16, "context": 8, "pipeline": 8}
# Beginnings of the fields that a search sets. It changes eval.batch_size only where accumulation
# makes it.
SEARCHED = (
    "mesh.",
    "compute.remat",
    "compute.shard_sequence",
    "compute.pipeline_",
    "train.accumulate",
)
# The part of the memory that a search fills. Arithmetic and compiler mostly differ by less than a
# tenth (benchmarks/plan.py).
MARGIN = 0.92
# The most microbatches of a step. A larger number is a mistake rather than a run.
MOST_ACCUMULATE = 1 << 20
# If the compiler refuses a config, it will also refuse one whose peak by the arithmetic is above
# this part of the refused one's.
CLOSE = 0.97


class Candidate(NamedTuple):
    """A config that a search tried."""

    config: configs.Config
    estimate: Estimate


@cache
def divisors(number: int, most: int = MOST_ACCUMULATE) -> tuple[int, ...]:
    """Returns the divisors up to `most`, in order."""
    small = [n for n in range(1, min(math.isqrt(number), most) + 1) if number % n == 0]
    large = [number // n for n in small if number // n <= most]
    return tuple(sorted({*small, *large}))


def generate_meshes(config: configs.Config, topology: Topology) -> Iterator[configs.Mesh]:
    """Yields meshes that use every device.

    Slices hold copies (data), and the other axes stay inside a slice. Meshes have the config's own
    `zero`, and also 3 where that cuts anything.
    """
    model = config.model
    inside = topology.devices // topology.slices
    has_experts = configs.has_experts(model)

    for tensor, context, pipeline in _generate_outer_sizes(model, inside):
        left = inside // tensor // context // pipeline
        for expert in divisors(math.gcd(left, model.experts)) if has_experts else (1,):
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


def _generate_outer_sizes(model: configs.Model, devices: int) -> Iterator[tuple[int, int, int]]:
    """Yields sizes of the axes (tensor, context, pipeline)."""
    heads = math.gcd(model.heads, model.kv_heads)
    for tensor in divisors(math.gcd(devices, heads), LARGEST["tensor"]):
        for context in divisors(devices // tensor, LARGEST["context"]):
            for pipeline in divisors(devices // tensor // context, LARGEST["pipeline"]):
                if context == 1 or pipeline == 1:  # A pipeline cuts no sequences.
                    yield tensor, context, pipeline


def generate_variants(config: configs.Config, mesh: configs.Mesh) -> Iterator[list[configs.Config]]:
    """Yields lists of configs on a mesh, each with more and more accumulation.

    There is a list for each remat policy, and in a pipeline for each number of microbatches and
    rounds. The first config of a list that fits is the fastest of that list.
    """
    shapes = [(1, 0)]
    if mesh.pipeline > 1:
        shapes = [(rounds, times * mesh.pipeline) for rounds in (1, 2) for times in (1, 2, 4)]

    for policy in list_policies(config.compute):
        for rounds, microbatches in shapes:
            compute = replace(
                policy,
                shard_sequence=mesh.tensor > 1,
                pipeline_rounds=rounds,
                pipeline_microbatches=microbatches,
            )
            variants = _accumulate_more(replace(config, compute=compute, mesh=mesh))
            if variants:
                yield variants


def list_policies(compute: configs.Compute) -> list[configs.Compute]:
    """Returns `compute` with each remat policy that is tried."""
    named = configs.set_remat(compute, "names")
    return [
        *(configs.set_remat(compute, remat) for remat in REMATS),
        *(replace(named, remat_save=names) for names in KEPT),
    ]


def _accumulate_more(config: configs.Config) -> list[configs.Config]:
    """Returns the config with every accumulation that its batch takes, the smallest first."""
    train = config.train
    unit = _count_rows(config.mesh)  # A microbatch is a multiple of so many rows.
    if config.compute.pipeline_microbatches:
        unit = unit // config.mesh.pipeline * config.compute.pipeline_microbatches
    if train.batch_size % unit:
        return []

    variants = []
    for accumulate in divisors(train.batch_size // unit):
        rows = config.eval.batch_size
        if rows % unit:
            rows = train.batch_size // accumulate
        variants.append(
            replace(
                config,
                train=replace(train, accumulate=accumulate),
                eval=replace(config.eval, batch_size=rows),
            )
        )
    return variants


def _count_rows(mesh: configs.Mesh) -> int:
    """Returns the rows of the smallest batch that the mesh can cut."""
    return math.prod(
        getattr(mesh, axis) * getattr(mesh, f"dcn_{axis}") for axis in configs.BATCH_AXES
    )


def standing_bytes(job: PlanJob, topology: Topology, mesh: configs.Mesh) -> float:
    """Returns the bytes of a device that no policy saves.

    They are the state, and gradients as large as the parameters.
    """
    shape = configs.mesh_shape(mesh, topology.devices)
    parts = ("params", "params", "opt", "ema")
    return sum(device_bytes(job, shape, part, mesh.zero) for part in parts)


def generate_fits(job: PlanJob, topology: Topology, limit: float) -> Iterator[Candidate]:
    """Yields all that runs and whose peak by the arithmetic is at most `limit` bytes.

    Of each list of variants it is the fastest.
    """
    for mesh in generate_meshes(job.config, topology):
        if standing_bytes(job, topology, mesh) > limit:
            continue
        for variants in generate_variants(job.config, mesh):
            candidate = _find_first_fit(job, topology, variants, limit)
            if candidate:
                yield candidate


def _find_first_fit(
    job: PlanJob, topology: Topology, variants: list[configs.Config], limit: float
) -> Candidate | None:
    """Returns the first of `variants` that fits.

    Peaks fall with accumulation. The exception is from 1 to 2, where a second sum of gradients
    comes in.
    """
    first = estimate_job(job._replace(config=variants[0]), topology)
    if first.problems:
        return None
    if first.memory.peak <= limit:
        return Candidate(variants[0], first)

    def fits(config: configs.Config) -> bool:
        changed = job._replace(config=config)
        platform = topology.chip.platform
        return estimate_memory(changed, first.shape, first.kernel, platform).peak <= limit

    place = 1 + bisect_left(variants[1:], True, key=fits)
    if place == len(variants):
        return None
    return Candidate(variants[place], estimate_job(job._replace(config=variants[place]), topology))


def search_meshes(job: PlanJob, topology: Topology, limit: float | None = None) -> list[Candidate]:
    """Returns what fits into `limit` bytes, or else into MARGIN of the memory; fastest first."""
    if limit is None:
        limit = MARGIN * topology.chip.memory
    return sorted(generate_fits(job, topology, limit), key=rank_candidate)


def rank_candidate(candidate: Candidate) -> tuple[float, int, float]:
    """Ranks by time to three digits, then by the plainest mesh, then by the emptiest memory."""
    estimate = candidate.estimate
    axes = sum(size > 1 for size in estimate.shape.values())
    return float(f"{estimate.step:.3g}"), axes, estimate.memory.peak


def _format_value(value: Any) -> str:
    """Returns a value as an override has it; names are joined by commas, as people write them."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, tuple | list):
        return str(value)
    is_plain = value and all(isinstance(entry, str) and entry.isidentifier() for entry in value)
    return ",".join(value) if is_plain else str(_freeze_lists(value))


def _freeze_lists(value: Any) -> Any:
    """Returns the value with tuples for its lists, as the fields of a config have them."""
    return tuple(map(_freeze_lists, value)) if isinstance(value, list) else value


def list_overrides(old: configs.Config, new: configs.Config) -> list[str]:
    """Returns what to add to a command line to come from one config to the other."""
    changes = configs.changes(old, new)
    return [f"--config.{key}={_format_value(value)}" for key, _, value, _ in changes]


def is_searched(override: str) -> bool:
    """Returns whether an override of a command line is of a field that a search sets."""
    return override.removeprefix("--config.").startswith(SEARCHED)
