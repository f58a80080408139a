"""Bytes on one device by arithmetic: what stays through a step, and what a microbatch adds.

State and gradients follow from shapes and layouts. Activations follow from what each remat policy
keeps of every layer, and from one layer that is being worked on. The factors below stand for the
temporaries of the compiler's fusions. benchmarks/plan.py shows how far the sums are from compiled
programs.
"""

import math
from dataclasses import dataclass, fields

from gpt_jax import config as configs
from gpt_jax.model import KERNELS
from gpt_jax.plan.experts import GATHERED, count_places, expert_weight_bytes, widen_for_buffers
from gpt_jax.plan.job import (
    FULL_BYTES,
    PlanJob,
    Widths,
    compute_bytes,
    device_bytes,
    gradient_bytes,
    group_layers,
)
from gpt_jax.plan.microbatch import Microbatch, split_microbatch, stream_bytes
from gpt_jax.plan.remat import host_bytes, saved_bytes
from gpt_jax.plan.roofline import is_document_map

# Columns of a batch, of four bytes an entry each, and the two that a document mask adds.
COLUMNS = 4
DOCUMENT_COLUMNS = 2
# Arrays as wide as the stream, in float32 or twice in bfloat16, while a layer's gradient is made.
STREAMS = 6.0
# Each of q, k, v and the feed-forward's inner channels has its value and its gradient. In a layer
# of experts their rows are most of it, and not all live at once (moe:8x7b on v6e, v5p, H100 and
# H200).
INSIDE = 2.0
INSIDE_EXPERTS = 1.2
# Arrays that the activation of a feed-forward leaves behind without remat. They were fitted to
# gpt2:1558m (gelu_tanh) and modern:d26 (relu2) on 8 H100. The others are taken for smooth ones, and
# llama:8b (swiglu) on 8 H200 agrees.
ACTIVATIONS = {"relu": 2.0, "relu2": 2.0}
SMOOTH = 5.0
# Times one layer's experts in bfloat16. Their gradients in float32 are twice as large, and TPUs
# make as much again in copies of other layouts.
EXPERTS = {"tpu": 6.0, "gpu": 3.0}
# Output matrices in float32 while the loss goes through its chunks. One is the sum of their
# gradients. GPUs do not fuse it, so they also have one chunk's gradient. The third was the matrix
# itself; it is counted still, until a program for a GPU shows that it is gone.
SUMMED = {"tpu": 1.0, "gpu": 3.0}
LOGITS = 2.0  # Float32 logits and their gradient.
# Streams over all of the sequence, where it is cut between matmuls (shard_sequence) and gathered
# for them.
WHOLE = 4.0
# The compiler's one block of temporaries over what lives in it at its worst moment, less 1. On TPUs
# it is between 0 (llama:8b on 256 v5e) and 0.17 (llama:1b on 16 v5e, llama:8b on 64 v5p). On GPUs
# llama:8b on 8 H100 has none.
GAPS = {"tpu": 0.08, "gpu": 0.0}


@dataclass(frozen=True)
class HostMemory:
    """Bytes in the memory of the host that belong to one device."""

    optimizer: float
    activations: float


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, and what it has on its host."""

    parameters: float
    optimizer: float
    average: float
    gradients: float
    batch: float
    activations: float
    working: float  # Temporaries of the one layer that is worked on.
    logits: float
    gathered: float  # Weights that are whole for a moment.
    gaps: float  # A part of all temporaries, and no bytes.
    host: HostMemory

    @property
    def state(self) -> float:
        return self.parameters + self.optimizer + self.average

    @property
    def temporary(self) -> float:
        """Logits are freed before the first layer's gradient is made; all else may meet."""
        return self.gradients + self.activations + self.gathered + max(self.logits, self.working)

    @property
    def peak(self) -> float:
        return self.state + self.batch + self.temporary * (1 + self.gaps)

    def list_parts(self) -> dict[str, float]:
        """Returns the device's bytes by the name of the part, gaps in bytes too."""
        names = [field.name for field in fields(self) if field.name != "host"]
        parts = {name: getattr(self, name) for name in names}
        return parts | {"gaps": self.gaps * self.temporary}


def estimate_memory(job: PlanJob, shape: dict[str, int], kernel: str, platform: str) -> Memory:
    """Returns the memory on a mesh of these axis sizes.

    `kernel` is the attention kernel's name; `platform` is "tpu" or "gpu".
    """
    config = job.config
    zero = config.mesh.zero
    here = split_microbatch(job, shape)
    places = count_places(config, shape, here.tick_tokens, platform)
    layers = [
        (widen_for_buffers(widths, config, places, platform), count)
        for widths, count in group_layers(job.layers)
    ]

    parameters = device_bytes(job, shape, "params", zero)
    # Microbatches add to a sum of their own. With `reduce_once` it is each device's part of the
    # sum, and as large, because the weights are whole there too.
    sums = 2 if config.train.accumulate > 1 else 1
    return Memory(
        parameters=parameters,
        optimizer=device_bytes(job, shape, "opt", zero),
        average=device_bytes(job, shape, "ema", zero),
        gradients=parameters * sums,
        batch=_batch_bytes(config, shape, here),
        activations=_activation_bytes(job, layers, shape, here, kernel),
        working=_working_bytes(job, layers, shape, here, kernel, platform),
        logits=_logits_bytes(config, shape, here),
        gathered=_gathered_bytes(job, shape, platform),
        gaps=GAPS[platform],
        host=HostMemory(
            optimizer=device_bytes(job, shape, "host", zero),
            activations=_host_activation_bytes(job, layers, shape, here, kernel),
        ),
    )


def _batch_bytes(config: configs.Config, shape: dict[str, int], here: Microbatch) -> float:
    columns = COLUMNS + DOCUMENT_COLUMNS if config.data.document_mask else COLUMNS
    row = columns * FULL_BYTES * here.rows * config.train.seq_len / shape["context"]
    return row * config.train.accumulate


def _logits_bytes(config: configs.Config, shape: dict[str, int], here: Microbatch) -> float:
    chunk = (config.train.loss_chunk or config.train.seq_len) / shape["context"]
    return LOGITS * here.rows * chunk * config.model.vocab / shape["tensor"] * FULL_BYTES


def _activation_bytes(
    job: PlanJob,
    layers: list[tuple[Widths, int]],
    shape: dict[str, int],
    here: Microbatch,
    kernel: str,
) -> float:
    """Returns what the forward pass leaves behind for the backward one."""
    model = job.config.model
    a_token = sum(kept_bytes(job, widths, shape, kernel) * count for widths, count in layers)
    total = here.tick_tokens * here.ticks * a_token * here.tick_layers / len(job.layers)

    stream = stream_bytes(job, shape)
    stages = shape["pipeline"]
    if stages > 1:  # Every stage holds the streams of all microbatches, coming and going.
        total += 3 * here.tokens * stages * stream
    streams = 1 + model.residual_scalars + model.backout
    return total + here.tokens * stream * streams


def _host_activation_bytes(
    job: PlanJob,
    layers: list[tuple[Widths, int]],
    shape: dict[str, int],
    here: Microbatch,
    kernel: str,
) -> float:
    """Returns what the forward pass leaves on the host for the backward one."""
    a_token = sum(host_bytes(job, widths, shape, kernel) * count for widths, count in layers)
    return here.tick_tokens * here.ticks * a_token * here.tick_layers / len(job.layers)


def kept_bytes(job: PlanJob, widths: Widths, shape: dict[str, int], kernel: str) -> float:
    """Returns the bytes that the forward pass leaves behind for a token in one layer.

    `widths` are those of the buffers (see widen_for_buffers).
    """
    model = job.config.model
    entry = compute_bytes(job)
    tensor = shape["tensor"]
    stream = stream_bytes(job, shape)
    if job.config.compute.remat in ("block", "offload"):
        return stream
    if job.config.compute.remat == "names":
        return saved_bytes(job, widths, shape, kernel)

    inside = (widths.q + 2 * widths.kv + widths.inner) / tensor * entry
    # Results of matmuls that are read again: q, k, v, the projection of attention's output, and of
    # dense layers the inner channels. Kernels that are not run again leave their output, and a
    # float32 for each head.
    if job.config.compute.remat == "dots":
        attention = (widths.q + 2 * widths.kv) / tensor * entry
        result = 0.0
        if KERNELS[kernel].keeps_result:
            result = (widths.q * entry + model.heads * FULL_BYTES) / tensor
        return 2 * stream + result + (attention if widths.sent else inside)

    # What goes into the matmuls, and the float32 of the norms themselves.
    norms = 2 * (stream + stream / entry * FULL_BYTES)
    hidden = widths.hidden * ACTIVATIONS.get(widths.ffn, SMOOTH)
    activation = (2 * widths.q + hidden) / tensor * entry
    # What goes into the experts, and what comes back.
    sent = 2 * widths.sent * model.embed * entry
    return 3 * stream + inside + norms + activation + sent


def _working_bytes(
    job: PlanJob,
    layers: list[tuple[Widths, int]],
    shape: dict[str, int],
    here: Microbatch,
    kernel: str,
    platform: str,
) -> float:
    """Returns the temporaries of one layer while its gradient is made."""
    model = job.config.model
    entry = compute_bytes(job)
    widest = max(inside_bytes(job, widths, shape) for widths, _ in layers)
    total = here.tick_tokens * (STREAMS * stream_bytes(job, shape) + widest)

    if job.config.compute.shard_sequence and shape["tensor"] > 1:
        total += here.tick_tokens * WHOLE * model.embed * entry
    total += EXPERTS[platform] * _expert_layer_bytes(job, shape)
    rows = here.tick_tokens / here.tokens * here.rows
    return total + scores_bytes(job, shape, rows, kernel)


def inside_bytes(job: PlanJob, widths: Widths, shape: dict[str, int]) -> float:
    """Returns the bytes of a token between a layer's matmuls while its gradient is made.

    `widths` are those of the buffers (see widen_for_buffers).
    """
    channels = (widths.q + 2 * widths.kv + widths.inner + widths.hidden) / shape["tensor"]
    # Tokens are at their experts and come back. Over an axis expert they also exist as they are
    # sent and as they arrive.
    copies = 6 if shape["expert"] > 1 else 2
    rows = copies * widths.sent * job.config.model.embed
    factor = INSIDE_EXPERTS if widths.sent else INSIDE
    return factor * (channels + rows) * compute_bytes(job)


def scores_bytes(job: PlanJob, shape: dict[str, int], rows: float, kernel: str) -> float:
    """Returns the attention maps of one layer: of documents, or in float32 of scores.

    Most kernels make none.
    """
    seq_len = job.config.train.seq_len
    heads = job.config.model.heads
    if is_document_map(job, kernel):
        # The map is a term of the scores in the compute dtype, and has a gradient as large.
        return 2 * rows * seq_len * seq_len * compute_bytes(job)
    if not KERNELS[kernel].makes_maps:
        return 0.0
    return 2 * rows * heads / shape["tensor"] * seq_len * seq_len * FULL_BYTES


def _count_sparse(job: PlanJob) -> int:
    """Returns the layers of experts."""
    return sum(widths.sent > 0 for widths in job.layers)


def _expert_layer_bytes(job: PlanJob, shape: dict[str, int]) -> float:
    """Returns the experts of one layer as a device multiplies with them."""
    return expert_weight_bytes(job, shape, compute_bytes(job)) / max(1, _count_sparse(job))


def _gathered_bytes(job: PlanJob, shape: dict[str, int], platform: str) -> float:
    """Returns the weights that are cut over devices and whole while they are used."""
    if math.prod(shape[axis] for axis in configs.FSDP_AXES) == 1:
        return 0.0
    config = job.config
    train = config.train
    entry = compute_bytes(job)
    zero = config.mesh.zero

    whole = shape | GATHERED | {"expert": 1}
    layers = device_bytes(job, whole, "params", 3, "layer", entry)
    layers += device_bytes(job, whole, "params", 3, "value_embed", entry)
    layer = layers / len(job.layers)
    experts = _expert_layer_bytes(job, shape)
    table = config.model.vocab * config.model.embed / shape["tensor"]

    total = table * FULL_BYTES
    # A layer's gradient is whole until it is scattered, and may be wider than its weights are.
    total += (layer + experts) / entry * (gradient_bytes(job) - entry)
    if zero == 3:  # One layer is used while the next one is gathered.
        total = (2 * (layer + experts) + table * entry) + total
    if 0 < train.loss_chunk < train.seq_len:
        total += (SUMMED[platform] - 1) * table * FULL_BYTES
    if config.compute.remat == "none" and zero == 3:
        # The gathered weights stay for the backward pass.
        total += (layer * len(job.layers) + experts * _count_sparse(job)) / shape["pipeline"]
    return total
