"""Seconds of a step by arithmetic: matmuls, attention, passes over memory, the update.

Matmuls count the FLOPs that are really done. These include what remat does again and the idle ticks
of a pipeline. Passes over memory are what is read and written between matmuls.
"""

from gpt_jax import config as configs
from gpt_jax.model import KERNELS
from gpt_jax.plan.experts import (
    count_padding,
    count_places,
    count_turns,
    expert_weight_bytes,
    is_blockwise,
)
from gpt_jax.plan.job import (
    FULL_BYTES,
    PlanJob,
    Widths,
    compute_bytes,
    device_bytes,
    group_layers,
)
from gpt_jax.plan.microbatch import Microbatch
from gpt_jax.plan.remat import is_recomputed, repeated_part
from gpt_jax.plan.topology import Topology

# Parts of the peak that matmuls are assumed to reach. A compiled 8,192-cubed one has 0.7 to 0.9 on
# TPUs by the compiler's own cycles, and published runs stay below 0.8 of an H100's peak.
EFFICIENCY = {"tpu": 0.85, "gpu": 0.75}
# Parts of the bf16 peak for float32. By default XLA multiplies float32 in one pass of bfloat16 on a
# TPU, and as TF32 on a GPU. The peak of TF32 is half (data sheets of H100, H200, B200).
FLOAT32 = {"tpu": 1.0, "gpu": 0.5}
# Times that arrays are read or written, forward and backward together.
TOUCHES = 14.0  # Arrays as wide as the stream, in a layer.
INSIDE_TOUCHES = 3.0  # Arrays inside a layer: hidden values, queries, keys and values.
MAP_TOUCHES = 8.0  # Maps of every query and key, where a kernel makes them.
LOGITS_TOUCHES = 4.0  # Float32 logits are made and read, and so is their gradient.
UPDATE_TOUCHES = 2.0  # Every array of the optimiser is read and written.


def multiply_peak(job: PlanJob, topology: Topology) -> float:
    """Returns the FLOP/s of one device in the dtype that is multiplied."""
    is_full = job.config.compute.dtype == "float32"
    return topology.peak * (FLOAT32[topology.chip.platform] if is_full else 1.0)


def matmul_seconds(job: PlanJob, topology: Topology, flops: float) -> float:
    return flops / multiply_peak(job, topology) / EFFICIENCY[topology.chip.platform]


def count_fp8_params(job: PlanJob) -> int:
    """Returns the entries of matrices that a token is multiplied with in fp8."""
    if job.config.compute.matmul_dtype != "fp8":
        return 0

    channels = 0
    for widths, count in group_layers(job.layers):
        inner, hidden = _find_dense(job, widths)
        channels += (2 * widths.q + 2 * widths.kv + inner + hidden) * count
    return channels * job.config.model.embed


def _find_dense(job: PlanJob, widths: Widths) -> tuple[int, int]:
    """Returns (inner, hidden) without the experts, which are not in fp8. Shared ones are."""
    if not widths.sent:
        return widths.inner, widths.hidden
    shared = job.config.model.shared_experts
    together = widths.sent + shared
    return widths.inner * shared // together, widths.hidden * shared // together


def count_fp8_entries(job: PlanJob, tokens: float, tensor: int = 1) -> float:
    """Returns the entries that one device scales and rounds to fp8 for `tokens` in all layers.

    They are what goes into each linear map, its weights, and its result's gradient. Remat does the
    first two again. The compiler may do equal ones once, such as the inputs of q, k and v.
    """
    matrices = count_fp8_params(job)
    if not matrices:
        return 0.0

    embed = job.config.model.embed
    inputs = gradients = 0
    for widths, count in group_layers(job.layers):
        inner, hidden = _find_dense(job, widths)
        into_ffn = embed * inner // hidden if hidden else 0  # Of the gate and of the value.
        out_of_ffn = embed if hidden else 0
        whole = 3 * embed + into_ffn
        inputs += (whole + (widths.q + hidden) / tensor) * count
        cut = widths.q + 2 * widths.kv + inner
        gradients += (embed + out_of_ffn + cut / tensor) * count

    times = 1 if job.config.compute.remat == "none" else 2
    return times * (tokens * inputs + matrices / tensor) + tokens * gradients


def _fp8_gain(job: PlanJob, topology: Topology, flops: float) -> float:
    """Returns the seconds that so many FLOPs take less in fp8: none where it is emulated.

    Matmuls in fp8 are assumed to reach the same part of their peak.
    """
    if topology.fp8_peak is None:
        return 0.0
    wide = matmul_seconds(job, topology, flops)
    return wide * (1 - multiply_peak(job, topology) / topology.fp8_peak)


def is_document_map(job: PlanJob, kernel: str) -> bool:
    """Returns whether the kernel gets documents as a map of every query and key."""
    return KERNELS[kernel].maps_documents and job.config.data.document_mask


def attention_flops(job: PlanJob, kernel: str) -> float:
    """Returns the FLOPs of a token's attention, forward and backward, as `kernel` computes it."""
    skips = KERNELS[kernel].skips_future and not is_document_map(job, kernel)
    flops = job.causal_flops if skips else job.full_flops
    return flops - 6 * job.matmul_params


def attention_seconds(job: PlanJob, topology: Topology, kernel: str, here: Microbatch) -> float:
    """Returns the seconds of attention's scores and sums on one device in a step."""
    tokens = job.config.train.batch_size * job.config.train.seq_len / topology.devices
    repeats = 4 / 3 if _repeats_attention(job.config.compute, kernel) else 1.0
    flops = attention_flops(job, kernel) * repeats * _count_idle(job, here)
    return tokens * flops / multiply_peak(job, topology) / KERNELS[kernel].efficiency


def _repeats_attention(compute: configs.Compute, kernel: str) -> bool:
    """Returns whether the kernel runs forward again, which adds a forward pass to three.

    Every policy but `none` is counted so, and `names` only if it does not keep what the backward
    pass of the kernel reads.
    """
    if compute.remat == "names" and KERNELS[kernel].keeps_result:
        return is_recomputed(compute, "attention")
    return compute.remat != "none"


def compute_seconds(
    job: PlanJob, topology: Topology, kernel: str, shape: dict[str, int], here: Microbatch
) -> float:
    """Returns the seconds of matmuls and attention of one device in a step."""
    model = job.config.model
    train = job.config.train
    tokens = train.batch_size * train.seq_len / topology.devices

    # Chunks of the loss make their gradient with their logits, so they compute nothing again.
    head = 6 * model.vocab * model.embed
    wasted = _count_wasted(job, shape, here, topology.chip.platform)
    matrices = job.matmul_params - model.vocab * model.embed + wasted
    times = _count_repeats(job, topology.chip.platform) * _count_idle(job, here)
    layers = 6 * matrices * times

    matmuls = matmul_seconds(job, topology, tokens * (layers + head))
    scaled = 6 * count_fp8_params(job) * times
    matmuls -= _fp8_gain(job, topology, tokens * scaled)
    return matmuls + attention_seconds(job, topology, kernel, here)


def _count_repeats(job: PlanJob, platform: str) -> float:
    """Returns the FLOPs done over the FLOPs counted, of the matmuls of layers.

    Recomputing adds a forward pass to three. `dots` does not keep the matmuls of experts.
    """
    if job.config.compute.remat == "names":
        return 1 + repeated_part(job, platform) / 3
    is_sparse = any(widths.sent for widths in job.layers)
    repeats = {
        "none": 1.0,
        "block": 4 / 3,
        "offload": 1.0,
        "dots": 4 / 3 if is_sparse else 1.0,
    }
    return repeats[job.config.compute.remat]


def _count_idle(job: PlanJob, here: Microbatch) -> float:
    """Returns the work done over the work there is: a pipeline computes in its bubble too."""
    return here.ticks * here.tick_tokens * here.tick_layers / (here.tokens * len(job.layers))


def _count_wasted(job: PlanJob, shape: dict[str, int], here: Microbatch, platform: str) -> float:
    """Returns the entries of experts' matrices that a token is multiplied with for nothing.

    These are the rows beyond a capacity's choices, or half of each expert's last block.
    """
    model = job.config.model
    if model.dispatch == "capacity":
        times = max(0.0, model.capacity_factor - 1)
    else:
        times = count_padding(job.config, shape, here.tick_tokens, platform) / 2

    entries = [
        w.sent / (w.sent + model.shared_experts) * (w.inner + w.hidden) * model.embed * count
        for w, count in group_layers(job.layers)
        if w.sent
    ]
    return times * sum(entries)


def passes_seconds(
    job: PlanJob, topology: Topology, kernel: str, shape: dict[str, int], here: Microbatch
) -> float:
    """Returns the seconds of reading and writing arrays between matmuls.

    These are norms, residuals, activations, experts' rows, and what is rounded to fp8. Matmuls read
    the weights themselves.
    """
    model = job.config.model
    train = job.config.train
    platform = topology.chip.platform
    places = count_places(job.config, shape, here.tick_tokens, platform)
    count = len(job.layers)
    groups = group_layers(job.layers)
    sent = sum(w.sent * times for w, times in groups) / count
    inner = sum((w.inner + w.hidden + 2 * w.q) * times for w, times in groups) / count

    wide = model.embed / (shape["tensor"] if job.config.compute.shard_sequence else 1)
    wide += model.embed * places * sent
    inside = INSIDE_TOUCHES * (inner / shape["tensor"])
    a_token = compute_bytes(job) * (TOUCHES * wide + inside)
    a_tick = here.tick_tokens * a_token + _block_sum_bytes(job, shape, here, platform)
    layers = here.ticks * here.tick_layers * a_tick

    # An entry is read for the largest one, read again, and written as one byte.
    narrowed = count_fp8_entries(job, here.tick_tokens, shape["tensor"]) / count
    layers += here.ticks * here.tick_layers * narrowed * (2 * compute_bytes(job) + 1)

    if KERNELS[kernel].makes_maps:  # They are in float32.
        queries = here.tokens * count * MAP_TOUCHES * model.heads / shape["tensor"]
        layers += queries * train.seq_len * FULL_BYTES
    logits = LOGITS_TOUCHES * here.tokens * model.vocab / shape["tensor"] * FULL_BYTES
    return (layers + logits) * train.accumulate / topology.chip.bandwidth


def _block_sum_bytes(job: PlanJob, shape: dict[str, int], here: Microbatch, platform: str) -> float:
    """Returns the bytes of a layer's microbatch that experts' gradients take.

    Where experts are gone through block by block, every block reads and writes the float32 sum.
    """
    if not is_blockwise(job.config, platform):
        return 0.0
    a_layer = 2 * expert_weight_bytes(job, shape, FULL_BYTES) / len(job.layers)
    return a_layer * count_turns(job, shape, here.tick_tokens, platform)


def update_seconds(job: PlanJob, topology: Topology, shape: dict[str, int]) -> float:
    """Returns the seconds of the optimiser's update, without the links to the host."""
    state = sum(device_bytes(job, shape, part) for part in ("params", "opt", "host", "ema"))
    gradients = device_bytes(job, shape, "params")
    return (UPDATE_TOUCHES * state + gradients) / topology.chip.bandwidth
