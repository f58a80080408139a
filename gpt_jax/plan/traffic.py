"""What crosses the links in a step: bytes that one device sends along each mesh axis.

The arithmetic counts the bytes of the algorithms that move the least. A gather over n devices, for
instance, sends (n - 1) / n of the result.
"""

from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.plan.experts import count_exchange_places
from gpt_jax.plan.job import (
    FULL_BYTES,
    PlanJob,
    compute_bytes,
    device_bytes,
    gradient_bytes,
    group_layers,
)
from gpt_jax.plan.microbatch import Microbatch, split_microbatch, stream_bytes
from gpt_jax.plan.remat import is_recomputed

# Mesh axes that cut the weights of a role, and along which every use of them gathers.
GATHER_AXES: dict[str, tuple[str, ...]] = {
    "layer": configs.FSDP_AXES,
    "value_embed": configs.FSDP_AXES,
    "expert": ("fsdp", "context"),
    "head": configs.FSDP_AXES,
    "embed": configs.FSDP_AXES,
}
# Mesh axes along which every device has the weights whole, and rows of its own. Each stage of a
# pipeline has layers of its own, so that its axis is missing there.
COPY_AXES: dict[str, tuple[str, ...]] = {
    "layer": ("data",),
    "value_embed": ("data",),
    "expert": ("data",),
    "head": ("data", "pipeline"),
    "embed": ("data", "pipeline"),
}


class Flow(NamedTuple):
    """What one device sends along one mesh axis in a step."""

    axis: str
    what: str
    bytes: float
    hidden: bool  # It can run behind the matmuls of other layers.


class Use(NamedTuple):
    """How the weights of a role are used in an update."""

    role: str
    sums: float  # How often their gradients are summed.
    gathers: float  # How often they are gathered.
    gather_bytes: int  # Bytes of an entry that is gathered.
    sum_bytes: int  # Bytes of an entry of the gradients.
    # Whether the weights stay where they are stored, and so do sums of their gradients.
    stays: bool = False


def list_flows(
    job: PlanJob, shape: dict[str, int], platform: str, padded: bool = False
) -> list[Flow]:
    """Returns all flows of a step, one for each axis and kind.

    `platform` is "tpu" or "gpu", whose compilers differ. With `padded` the exchange of tokens with
    experts sends empty places too (model/experts/exchange.py).
    """
    here = split_microbatch(job, shape)
    flows = [
        *_list_update_flows(job, shape),
        *_list_weight_flows(job, shape, here, platform),
        *_list_lookup_flows(job, shape, here),
        *_list_layer_flows(job, shape, here, padded),
        *_list_stage_flows(job, shape, here),
        *_list_end_flows(job, shape, here),
    ]

    total: dict[Flow, float] = {}
    for flow in flows:
        key = flow._replace(bytes=0)
        total[key] = total.get(key, 0) + flow.bytes
    return [key._replace(bytes=size) for key, size in total.items()]


def share(size: int) -> float:
    """Returns the part that comes from other devices, of `size` devices in all."""
    return (size - 1) / size


def _list_update_flows(job: PlanJob, shape: dict[str, int]) -> list[Flow]:
    """Under ZeRO-1 each device updates its part of the parameters, and all gather the parts."""
    if job.config.mesh.zero != 1:
        return []
    flows = []
    for role, axes in GATHER_AXES.items():
        rest = device_bytes(job, shape, "params", 1, role)
        for axis in axes:
            if shape[axis] > 1:
                sent = share(shape[axis]) * rest
                flows.append(Flow(axis, "updated parameters gathered", sent, hidden=False))
                rest /= shape[axis]
    return flows


def _list_uses(job: PlanJob, shape: dict[str, int], here: Microbatch, platform: str) -> list[Use]:
    """Layers are used forward, and backward when they are recomputed, in every tick anew.

    The head and the table are used once, the table in float32. A TPU gathers it in the compute
    dtype if no axis cuts its vocabulary. A table whose columns are looked up where they lie is not
    gathered.
    """
    config = job.config
    entry = compute_bytes(job)
    gradient = gradient_bytes(job)
    passes = 1 if config.compute.remat == "none" else 2
    table_entry = entry if platform == "tpu" and shape["tensor"] == 1 else FULL_BYTES
    count = config.train.accumulate

    layer = Use("layer", here.ticks * count, passes * here.ticks * count, entry, gradient)
    head = Use("head", count, count, entry, gradient)
    stays = is_by_columns(job, shape)
    table = Use("embed", count, count, table_entry, FULL_BYTES, stays)
    values = Use("value_embed", layer.sums, layer.gathers, table_entry, FULL_BYTES, stays)
    uses = [layer, layer._replace(role="expert"), head, table, values]
    if config.model.tied:  # The table is the head, too.
        uses.append(head._replace(role="embed"))
    if not config.train.reduce_once or count == 1:
        return uses

    # Each device adds up its own gradients of all microbatches and of all uses, in float32.
    seen = set()
    added = []
    for use in uses:
        added.append(use._replace(sums=int(use.role not in seen), sum_bytes=FULL_BYTES))
        seen.add(use.role)
    return added


def _list_weight_flows(
    job: PlanJob, shape: dict[str, int], here: Microbatch, platform: str
) -> list[Flow]:
    """Weights are gathered where they are used, and gradients summed, in every microbatch.

    With `reduce_once` gradients are summed once.
    """
    zero = job.config.mesh.zero
    flows = []
    for use in _list_uses(job, shape, here, platform):
        axes = GATHER_AXES[use.role]
        whole = shape | dict.fromkeys(axes, 1)
        rest = device_bytes(job, whole, "params", 3, use.role, bytes_each=1)  # Entries.
        is_scattered = zero == 3 and _scatters(shape, axes, platform)

        for axis in axes:
            size = shape[axis]
            if size == 1:
                continue
            if use.stays:
                rest /= size
                continue
            if zero == 3:
                gathered = share(size) * rest * use.gather_bytes * use.gathers
                flows.append(Flow(axis, "weights gathered", gathered, hidden=True))
            summed = share(size) * rest * use.sum_bytes * use.sums
            flows.append(_make_sum(axis, summed, platform, is_scattered))
            rest /= size

        for axis in COPY_AXES[use.role]:
            if shape[axis] > 1:
                summed = share(shape[axis]) * rest * use.sum_bytes * use.sums
                flows.append(_make_sum(axis, summed, platform, is_scattered=False))
    return flows


def is_by_columns(job: PlanJob, shape: dict[str, int]) -> bool:
    """Returns whether devices look up own columns of the embedding and exchange them."""
    sizes = configs.find_lookup_sizes(job.config, job.config.train, shape)
    if sizes is None:
        return False
    return configs.choose_embed_lookup(job.config.compute.embed_lookup, sizes) == "columns"


def _list_lookup_flows(job: PlanJob, shape: dict[str, int], here: Microbatch) -> list[Flow]:
    """Looked-up columns travel forward and their gradients backward, after numbers of tokens.

    Value embeddings are looked up in their layers, and again where those are recomputed.
    """
    sizes = configs.find_lookup_sizes(job.config, job.config.train, shape)
    if sizes is None or not is_by_columns(job, shape):
        return []

    model = job.config.model
    passes = 1 if job.config.compute.remat == "none" else 2
    tables = sum(spec.value_embed for spec in configs.layer_specs(model))
    passed = here.tick_tokens * here.ticks * here.tick_layers / len(job.layers) * tables
    width = model.kv_heads * model.head_dim

    there_and_back = 2 * here.tokens * model.embed * sizes.entry
    there_and_back += (1 + passes) * passed * width * compute_bytes(job)
    numbers = (here.tokens + passed * passes) * sizes.devices * FULL_BYTES
    count = job.config.train.accumulate

    flows = []
    for axis in configs.FSDP_AXES:
        if shape[axis] > 1:
            sent = share(shape[axis]) * (there_and_back + numbers) * count
            flows.append(Flow(axis, "embeddings exchanged", sent, hidden=False))
            numbers /= shape[axis]
    return flows


def _scatters(shape: dict[str, int], axes: tuple[str, ...], platform: str) -> bool:
    """Returns whether gradients are scattered over these axes.

    libtpu 0.0.42 makes a sum of whole gradients and a cut out of two kinds of scatters. One is over
    all devices, and one is in the stages of a pipeline. Every such program that was compiled had
    them.
    """
    has_others = any(shape[axis] > 1 for axis in configs.AXES if axis not in axes)
    return platform != "tpu" or (has_others and shape["pipeline"] == 1)


def _make_sum(axis: str, once: float, platform: str, is_scattered: bool) -> Flow:
    """Gradients are summed over an axis, and each device keeps its part or everything.

    libtpu 0.0.42 makes gathers asynchronous and sums not, so that computing waits for sums.
    """
    is_hidden = platform != "tpu"
    if is_scattered:
        return Flow(axis, "gradients scattered", once, is_hidden)
    return Flow(axis, "gradients summed", 2 * once, is_hidden)


def _list_layer_flows(
    job: PlanJob, shape: dict[str, int], here: Microbatch, padded: bool
) -> list[Flow]:
    """Streams, keys and tokens cross between devices forward, recomputed and backward."""
    config = job.config
    model = config.model
    entry = compute_bytes(job)
    count = config.train.accumulate
    tensor, context, expert = (shape[axis] for axis in ("tensor", "context", "expert"))
    # Tokens that go through each layer.
    passed = here.tick_tokens * here.ticks * here.tick_layers / len(job.layers)

    flows = []
    for widths, times in group_layers(job.layers):
        through = passed * times
        if tensor > 1:
            # There are two sums forward and two backward, and attention's again when recomputed.
            repeated = is_recomputed(config.compute, "attention_out")
            sums = (4 + repeated) * 2 * share(tensor) * model.embed * entry * through
            flows.append(Flow("tensor", "streams summed", sums * count, hidden=False))

        if context > 1:
            # Keys and values go round, and backward their float32 gradients too.
            keys = 2 * widths.kv / tensor * through * (context - 1)
            repeated = is_recomputed(config.compute, "attention")
            sent = keys * ((2 + repeated) * entry + FULL_BYTES) * count
            flows.append(Flow("context", "keys and values", sent, hidden=False))

        if expert > 1 and widths.sent:
            # Tokens go there and back, forward and backward. Empty places may travel too.
            trips = 4 + is_recomputed(config.compute, "experts_in")
            trips += is_recomputed(config.compute, "experts_out")
            is_full = padded or model.dispatch == "capacity"
            places = count_exchange_places(model, shape) if is_full else 1
            moved = trips * share(expert) * widths.sent * model.embed * entry * through * places
            flows.append(Flow("expert", "tokens to experts", moved * count, hidden=False))
    return flows


def _list_stage_flows(job: PlanJob, shape: dict[str, int], here: Microbatch) -> list[Flow]:
    """Streams go through the stages of a pipeline."""
    stages = shape["pipeline"]
    if stages == 1:
        return []
    count = job.config.train.accumulate
    stream = stream_bytes(job, shape)
    between = 2 * here.ticks * here.tick_tokens * stream * count
    # Rows are gathered before the first stage and scattered behind the last, and both again
    # backward.
    ends = 4 * (stages - 1) * here.tokens * stream * count
    return [
        Flow("pipeline", "streams to the next stage", between, hidden=False),
        Flow("pipeline", "rows to the stages and back", ends, hidden=False),
    ]


def _list_end_flows(job: PlanJob, shape: dict[str, int], here: Microbatch) -> list[Flow]:
    """Embeddings and the head, whose vocabulary the axis tensor cuts, sum their streams."""
    tensor = shape["tensor"]
    if tensor == 1:
        return []
    ends = 3 * 2 * share(tensor) * job.config.model.embed * FULL_BYTES * here.tokens
    sent = ends * job.config.train.accumulate
    return [Flow("tensor", "embeddings and head", sent, hidden=False)]
