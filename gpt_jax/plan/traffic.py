"""What crosses the links in a step, by arithmetic: bytes that one device sends along each mesh
axis, and the speed of the axis's links (called by roofline and, for the speeds, by schedule).

Bytes are those of the algorithms that move the least (a gather over n devices: (n - 1) / n of the
result). An axis is laid over the machine as sharding.make_mesh does: the last axes on neighbouring
chips.
"""

import math
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.plan.job import PlanJob, device_bytes, kinds
from gpt_jax.plan.memory import FULL, Local, compute_bytes, local, room, stream_bytes
from gpt_jax.plan.topology import Topology

# Mesh axes that cut the weights of a role and that each use of them gathers.
OVER = dict.fromkeys(("layer", "head", "embed"), configs.FSDP_AXES) | {
    "expert": ("fsdp", "context")
}


# Those along which every device has the weights whole and rows of its own: each stage of a pipeline
# has its layers.
WHOLE = dict.fromkeys(("layer", "expert"), ("data",)) | dict.fromkeys(
    ("head", "embed"), ("data", "pipeline")
)


class Flow(NamedTuple):
    """`bytes`: sent by one device in a step; `hidden`: it can run behind matmuls of other
    layers."""

    axis: str
    what: str
    bytes: float
    hidden: bool


class Link(NamedTuple):
    """Of one mesh axis. `speed`: bytes a second that one device sends, one direction of
    everything it can use."""

    name: str
    speed: float


def _torus_link(topology: Topology, within: dict[str, int], axis: str) -> Link:
    """Dims of the torus are dealt out from the last axis to the first. A closed dim sends both
    ways, an open one at half; an axis on a part of a dim is open. Two cores of a chip (TPU7x)
    are a dim of their own: alone as fast as all six links of the chip, with others one more open
    dim; cores share the links."""
    chip = topology.chip
    free = [(size, wraps) for size, wraps in zip(topology.shape, topology.wraps)]
    if chip.per_chip > 1:
        free.append((chip.per_chip, True))
    for name in reversed(configs.AXES):
        size, speed, cores = within[name], 0.0, chip.per_chip > 1 and len(free) > chip.dims
        while size > 1 and free:
            length, wraps = free[-1]
            part = math.gcd(size, length)
            if part == 1:
                break
            speed += chip.link * (2 if wraps and part == length and length > 2 else 1)
            size //= part
            free[-1] = (length // part, False)
            if length == part:
                free.pop()
        if name == axis and cores and within[name] == chip.per_chip:
            return Link("ICI", 2 * chip.dims * chip.link)
        if name == axis:
            return Link("ICI", (speed or chip.link) / chip.per_chip)
    raise KeyError(axis)


def link(topology: Topology, shape: dict[str, int], across: dict[str, int], axis: str) -> Link:
    """The link that mesh axis `axis` is bound by; `across`: the part of each size that crosses
    slices (or hosts)."""
    chip, within = topology.chip, {name: shape[name] // across[name] for name in shape}
    if chip.platform == "tpu":
        inside = _torus_link(topology, within, axis)
        if across[axis] == 1:
            return inside
        return Link(
            "DCN", min(inside.speed if within[axis] > 1 else math.inf, chip.network * within[axis])
        )
    stride = math.prod(within[name] for name in configs.AXES[configs.AXES.index(axis) + 1 :])
    together = max(1, min(within[axis], chip.per_host // stride))  # devices of the axis in one host
    if together == shape[axis] or topology.hosts == 1:
        return Link("NVLink", chip.link)
    return Link("network", min(chip.link, chip.network * together))


def share(size: int) -> float:
    return (size - 1) / size


class Use(NamedTuple):
    """Weights of a role in a microbatch: how often they are gathered and their gradients summed,
    in how many bytes an entry."""

    role: str
    gathers: float
    gather_bytes: int
    sums: float
    sum_bytes: int


def _uses(job: PlanJob, shape: dict[str, int], here: Local, platform: str) -> list[Use]:
    """Layers: forward and, when they are recomputed, backward, each tick of a pipeline anew.
    Head and table: once; the table in float32, but that a TPU gathers one whose vocabulary no
    axis cuts in the compute dtype."""
    config, half = job.config, compute_bytes(job)
    again = config.compute.remat != "none"
    head = (1, half, 1, half)
    table = (1, half if platform == "tpu" and shape["tensor"] == 1 else FULL, 1, FULL)
    layer = ((1 + again) * here.ticks, half, here.ticks, half)
    tied = [Use("embed", *head)] if config.model.tied else []
    return [
        Use("layer", *layer),
        Use("expert", *layer),
        Use("head", *head),
        Use("embed", *table),
        *tied,
    ]


def _weights(job: PlanJob, shape: dict[str, int], here: Local, platform: str) -> list[Flow]:
    """Weights gathered where they are used and gradients summed, in every microbatch."""
    zero, count, found = job.config.mesh.zero, job.config.train.accumulate, []
    if zero == 1:
        for role, over in OVER.items():
            rest = device_bytes(job, shape, "params", 1, role)
            for axis in (axis for axis in over if shape[axis] > 1):
                found.append(
                    Flow(axis, "updated parameters gathered", share(shape[axis]) * rest, False)
                )
                rest /= shape[axis]
    for use in _uses(job, shape, here, platform):
        over = OVER[use.role]
        rest = device_bytes(
            job, shape | dict.fromkeys(over, 1), "params", 3, use.role, 1
        )  # entries of this role, whole
        for axis in over:
            n = shape[axis]
            if n > 1 and zero == 3:
                gathered = share(n) * rest * use.gather_bytes * use.gathers * count
                found.append(Flow(axis, "weights gathered", gathered, True))
            if n > 1:
                summed = share(n) * rest * use.sum_bytes * use.sums * count
                found.append(
                    _sum(axis, summed, platform, cut=zero == 3 and _scatters(shape, over, platform))
                )
            rest /= n
        for axis in WHOLE[use.role]:
            if (n := shape[axis]) > 1:
                found.append(
                    _sum(
                        axis,
                        share(n) * rest * use.sum_bytes * use.sums * count,
                        platform,
                        cut=False,
                    )
                )
    return found


def _scatters(shape: dict[str, int], over: tuple[str, ...], platform: str) -> bool:
    """Whether gradients are scattered over these axes. libtpu 0.0.42 makes of a scatter over all
    devices, and of one in a pipeline's stages, a sum of whole gradients and a cut (seen in every
    such program that was compiled)."""
    others = [axis for axis in configs.AXES if axis not in over and shape[axis] > 1]
    return platform != "tpu" or (bool(others) and shape["pipeline"] == 1)


def _sum(axis: str, once: float, platform: str, cut: bool) -> Flow:
    """Gradients summed over an axis, each device keeping its part (`cut`) or everything. libtpu
    0.0.42 makes gathers asynchronous and sums not: computing waits for those."""
    return Flow(
        axis,
        "gradients scattered" if cut else "gradients summed",
        once * (1 if cut else 2),
        platform != "tpu",
    )


def _activations(job: PlanJob, shape: dict[str, int], here: Local, padded: bool) -> list[Flow]:
    """Streams and keys that cross between devices, forward, recomputed and backward."""
    config, model, half = job.config, job.config.model, compute_bytes(job)
    count, flows = config.train.accumulate, []
    passed = (
        here.tick_tokens * here.ticks * here.tick_layers / len(job.layers)
    )  # tokens through each layer
    again = job.config.compute.remat in ("block", "offload")
    tensor, context, expert, stages = (
        shape[axis] for axis in ("tensor", "context", "expert", "pipeline")
    )
    for widths, times in kinds(job.layers):
        through = passed * times
        if (
            tensor > 1
        ):  # two sums forward, two backward, and attention's again when it is recomputed
            sums = (4 + again) * 2 * share(tensor) * model.embed * half * through
            flows.append(Flow("tensor", "streams summed", sums * count, False))
        if context > 1:  # keys and values go round; backward their float32 gradients too
            keys = 2 * widths.kv / tensor * through * (context - 1)
            flows.append(
                Flow(
                    "context", "keys and values", keys * ((2 + again) * half + FULL) * count, False
                )
            )
        if (
            expert > 1 and widths.sent
        ):  # there and back, forward and backward; empty places too where they travel
            moved = (
                (4 + 2 * again)
                * share(expert)
                * widths.sent
                * model.embed
                * half
                * through
                * (room(model, shape) if padded or model.dispatch == "capacity" else 1)
            )
            flows.append(Flow("expert", "tokens to experts", moved * count, False))
    if stages > 1:
        flows.append(
            Flow(
                "pipeline",
                "streams to the next stage",
                2 * here.ticks * here.tick_tokens * stream_bytes(job, shape) * count,
                False,
            )
        )
        # Gathered before the first stage, scattered behind the last, and both again backward.
        flows.append(
            Flow(
                "pipeline",
                "rows to the stages and back",
                4 * (stages - 1) * here.tokens * stream_bytes(job, shape) * count,
                False,
            )
        )
    if tensor > 1:
        ends = 3 * 2 * share(tensor) * model.embed * FULL * here.tokens
        flows.append(Flow("tensor", "embeddings and head", ends * count, False))
    return flows


def flows(job: PlanJob, shape: dict[str, int], platform: str, padded: bool = False) -> list[Flow]:
    """All of a step, one entry for each axis and kind. `platform`: tpu or gpu, whose compilers
    differ; `padded`: the exchange of tokens with experts sends empty places too
    (model/experts.py)."""
    here, total = local(job, shape), {}
    for flow in _weights(job, shape, here, platform) + _activations(job, shape, here, padded):
        key = flow._replace(bytes=0)
        total[key] = total.get(key, 0) + flow.bytes
    return [key._replace(bytes=size) for key, size in total.items()]
