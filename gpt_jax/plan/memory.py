"""Bytes on one device, by arithmetic: what stands through a step, and what a microbatch adds
(called by roofline).

State and gradients follow from shapes and layouts. Activations follow from what each remat policy
keeps of every layer (model/transformer.REMATS), plus one layer being worked on. The factors below
stand for the temporaries of the compiler's fusions; benchmarks/plan.py shows how far from compiled
programs they are.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.model import EXPERT_WAYS, choose_block_rows
from gpt_jax.plan.job import PlanJob, Widths, device_bytes, kinds

GATHERED = {
    "fsdp": 1,
    "context": 1,
    "pipeline": 1,
}  # axes that cut no weight of experts where it is multiplied
HALF, FULL = 2, 4  # bytes of bfloat16 and float32
COLUMNS, APART = (
    4,
    2,
)  # of a batch, four bytes an entry each; more where documents are kept apart (data/rows.py)
# arrays as wide as the stream, in float32 or twice in bfloat16, while a layer's gradient is made
STREAMS = 6.0
# Each of q, k, v and the feed-forward's inner channels: its value and its gradient. In a layer of
# experts, whose rows are most of it, not all live at once (moe:8x7b on v6e, v5p, H100 and H200).
INSIDE, INSIDE_EXPERTS = 2.0, 1.2
# Arrays that a feed-forward's activation leaves behind without remat: fitted to gpt2:1558m
# (gelu_tanh) and modern:d26 (relu2) on 8 H100; the others are taken for smooth ones, and llama:8b
# (swiglu) on 8 H200 agrees.
ACTIVATIONS = {"relu": 2.0, "relu2": 2.0}
SMOOTH = 5.0
# Times one layer's experts in bfloat16: their gradients in float32, and on TPUs copies in other
# layouts (the same).
EXPERTS = {"tpu": 6.0, "gpu": 3.0}
# Output matrices in float32 while the loss goes through its chunks (train/loss.py): the sum of
# their gradients, and on GPUs, which do not fuse it, one chunk's and the matrix itself.
SUMMED = {"tpu": 1.0, "gpu": 3.0}
LOGITS = 2.0  # float32 logits and their gradient
# streams over all of the sequence, where it is cut between matmuls (shard_sequence) and gathered
# for them
WHOLE = 4.0
# What the compiler's one block of temporaries has more than what lives in it at its worst moment.
# TPU: between 0 (llama:8b on 256 v5e) and 0.17 (llama:1b on 16 v5e, llama:8b on 64 v5p). GPU:
# llama:8b on 8 H100 has none.
GAPS = {"tpu": 0.08, "gpu": 0.0}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. `gathered`: weights whole for a moment; `working`: one layer's
    temporaries; `gaps`: as a part of all temporaries."""

    parameters: float
    optimizer: float
    average: float
    gradients: float
    batch: float
    activations: float
    working: float
    logits: float
    gathered: float
    gaps: float

    @property
    def state(self) -> float:
        return self.parameters + self.optimizer + self.average

    @property
    def temporary(self) -> float:
        return self.gradients + self.activations + self.gathered + max(self.logits, self.working)

    @property
    def peak(self) -> float:
        """Logits are gone when the first layer's gradient is made; the rest meets."""
        return self.state + self.batch + self.temporary * (1 + self.gaps)

    def rows(self) -> dict[str, float]:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return parts | {"gaps": self.gaps * self.temporary}


class Local(NamedTuple):
    """What one device has of a microbatch of `train.accumulate`: `rows`, `tokens`. In a pipeline
    it works on `tick_tokens` at a time, `ticks` times, through `tick_layers` layers; without one
    on all its tokens, once, through all layers."""

    rows: float
    tokens: float
    tick_tokens: float
    ticks: int
    tick_layers: float


def local(job: PlanJob, shape: dict[str, int]) -> Local:
    config, stages, layers = job.config, shape["pipeline"], len(job.layers)
    rows = (
        config.train.batch_size
        / config.train.accumulate
        / math.prod(shape[axis] for axis in configs.BATCH_AXES)
    )
    tokens = rows * config.train.seq_len / shape["context"]
    if stages == 1:
        return Local(rows, tokens, tokens, 1, layers)
    count, rounds = config.compute.pipeline_microbatches or stages, config.compute.pipeline_rounds
    return Local(
        rows,
        tokens,
        tokens * stages / count,
        rounds * count + stages - 1,
        layers / (rounds * stages),
    )


def stream_bytes(job: PlanJob, shape: dict[str, int]) -> float:
    """Of the residual stream, for a local token."""
    model = job.config.model
    return (
        model.embed
        * compute_bytes(job)
        / (shape["tensor"] if job.config.compute.shard_sequence else 1)
    )


def compute_bytes(job: PlanJob) -> int:
    """Of one entry of what is multiplied."""
    return HALF if job.config.compute.dtype == "bfloat16" else FULL


def blockwise(model: configs.Model, platform: str) -> bool:
    """Whether experts are gone through block by block (model/grouped.py)."""
    return model.dispatch == "dropless" and platform not in EXPERT_WAYS


def _blocks(
    model: configs.Model, shape: dict[str, int], tokens: float, platform: str
) -> tuple[int, float, int]:
    """(experts of a device, choices that its `tokens` make, rows of a block)."""
    own, choices = max(1, model.experts // shape["expert"]), tokens * model.experts_per_token
    return own, choices, choose_block_rows(int(choices), own, platform)


def padding(model: configs.Model, shape: dict[str, int], tokens: float, platform: str) -> float:
    """Rows of blocks that may be empty, for each choice that a device's `tokens` make."""
    if not blockwise(model, platform):
        return 0.0
    own, choices, rows = _blocks(model, shape, tokens, platform)
    return own * rows / choices


def turns(job: PlanJob, shape: dict[str, int], tokens: float, platform: str) -> float:
    """Blocks of one expert that `tokens` fill on a device, half of the last one empty; 1 where
    nothing goes by blocks."""
    model = job.config.model
    if not blockwise(model, platform) or not any(widths.sent for widths in job.layers):
        return 1.0
    own, choices, rows = _blocks(model, shape, tokens, platform)
    return choices / own / rows + 0.5


def room(model: configs.Model, shape: dict[str, int]) -> float:
    """Places in the exchange of tokens with experts for each choice. Over an axis expert
    `dropless` has room for all that may come (model/experts.py)."""
    if model.dispatch == "capacity":
        return model.capacity_factor
    expert, chosen = shape["expert"], model.experts_per_token
    return expert * min(chosen, model.experts // expert) / chosen if expert > 1 else 1.0


def spare(model: configs.Model, shape: dict[str, int], tokens: float, platform: str) -> float:
    """Places of a device's buffers for each choice that its `tokens` make."""
    return room(model, shape) + padding(model, shape, tokens, platform)


def buffered(widths: Widths, model: configs.Model, times: float, platform: str) -> Widths:
    """`widths` as they stand in memory: those of experts `times` as wide (`spare`); their hidden
    values of one block only where they are gone through block by block."""
    if not widths.sent:
        return widths
    within = 0.0 if blockwise(model, platform) else times
    grow = (within * widths.sent + model.shared_experts) / (widths.sent + model.shared_experts)
    return widths._replace(
        inner=widths.inner * grow, hidden=widths.hidden * grow, sent=widths.sent * times
    )


def experts_bytes(job: PlanJob, shape: dict[str, int], bytes_each: int) -> float:
    """Of all layers' experts, as a device multiplies with them, at so many bytes a weight."""
    return device_bytes(job, shape | GATHERED, "params", 3, "expert", bytes_each)


def kept(job: PlanJob, widths: Widths, shape: dict[str, int]) -> float:
    """Bytes that the forward pass leaves behind for a token in one layer. `widths`: `buffered`."""
    model, half, tensor = job.config.model, compute_bytes(job), shape["tensor"]
    stream = stream_bytes(job, shape)
    inside = (widths.q + 2 * widths.kv + widths.inner) / tensor * half
    if job.config.compute.remat in ("block", "offload"):
        return stream
    if (
        job.config.compute.remat == "dots"
    ):  # results of matmuls that are read again: q, k, v, attention's output, inner; no experts'
        return 2 * stream + ((widths.q + 2 * widths.kv) / tensor * half if widths.sent else inside)
    norms = 2 * (
        stream + stream / half * FULL
    )  # what goes into the matmuls, and the norms' own float32
    activation = (
        (2 * widths.q + widths.hidden * ACTIVATIONS.get(widths.ffn, SMOOTH)) / tensor * half
    )
    sent = 2 * widths.sent * model.embed * half  # what goes into the experts, and what comes back
    return 3 * stream + inside + norms + activation + sent


def inside(job: PlanJob, widths: Widths, shape: dict[str, int]) -> float:
    """Bytes of a local token between a layer's matmuls while its gradient is made. `widths`:
    `buffered`."""
    half = compute_bytes(job)
    channels = (widths.q + 2 * widths.kv + widths.inner + widths.hidden) / shape["tensor"]
    # Tokens at their experts and what comes back; over an axis expert also as they are sent and as
    # they arrive.
    rows = (6 if shape["expert"] > 1 else 2) * widths.sent * job.config.model.embed
    return (INSIDE_EXPERTS if widths.sent else INSIDE) * (channels + rows) * half


def scores_bytes(job: PlanJob, shape: dict[str, int], rows: float, kernel: str) -> float:
    """Of attention's maps in float32, for kernels that make them: of one layer at a time."""
    if kernel not in ("reference", "xla"):
        return 0.0
    model, seq = job.config.model, job.config.train.seq_len
    return 2 * rows * model.heads / shape["tensor"] * seq * seq * FULL


def memory(job: PlanJob, shape: dict[str, int], kernel: str, platform: str) -> Memory:
    """For a mesh of these axis sizes; `kernel`: the attention kernel's name; `platform`: tpu or
    gpu."""
    config, zero = job.config, job.config.mesh.zero
    model, train, here, half = config.model, config.train, local(job, shape), compute_bytes(job)
    parameters = device_bytes(job, shape, "params", zero)
    fsdp = math.prod(shape[axis] for axis in configs.FSDP_AXES) > 1
    stages = shape["pipeline"]
    times = spare(model, shape, here.tick_tokens, platform)
    layers = [
        (buffered(widths, model, times, platform), count) for widths, count in kinds(job.layers)
    ]
    held = sum(kept(job, widths, shape) * count for widths, count in layers)
    activations = here.tick_tokens * here.ticks * held * here.tick_layers / len(job.layers)
    if stages > 1:  # every stage holds all microbatches' streams, coming and going
        activations += 3 * here.tokens * stages * stream_bytes(job, shape)
    activations += (
        here.tokens * stream_bytes(job, shape) * (1 + model.residual_scalars + model.backout)
    )
    sparse = sum(widths.sent > 0 for widths in job.layers)
    layer = device_bytes(job, shape | GATHERED | {"expert": 1}, "params", 3, "layer", half) / len(
        job.layers
    )
    experts = experts_bytes(job, shape, half) / max(1, sparse)
    working = here.tick_tokens * (
        STREAMS * stream_bytes(job, shape) + max(inside(job, w, shape) for w, _ in layers)
    )
    if config.compute.shard_sequence and shape["tensor"] > 1:
        working += here.tick_tokens * WHOLE * model.embed * half
    working += EXPERTS[platform] * experts
    working += scores_bytes(job, shape, here.tick_tokens / here.tokens * here.rows, kernel)
    chunk = (train.loss_chunk or train.seq_len) / shape["context"]
    logits = LOGITS * here.rows * chunk * model.vocab / shape["tensor"] * FULL
    table = model.vocab * model.embed / shape["tensor"]
    gathered = (2 * (layer + experts) + table * half) * fsdp * (zero == 3) + table * FULL * fsdp
    if 0 < train.loss_chunk < train.seq_len:
        gathered += (SUMMED[platform] - 1) * table * FULL * fsdp
    if (
        config.compute.remat == "none" and fsdp and zero == 3
    ):  # the gathered weights are kept for the backward pass
        gathered += (layer * len(job.layers) + experts * sparse) / stages
    return Memory(
        parameters=parameters,
        optimizer=device_bytes(job, shape, "opt", zero),
        average=device_bytes(job, shape, "ema", zero),
        gradients=parameters * (1 + (train.accumulate > 1)),
        batch=(COLUMNS + APART * config.data.document_mask)
        * FULL
        * here.rows
        * train.seq_len
        / shape["context"]
        * train.accumulate,
        activations=activations,
        working=working,
        logits=logits,
        gathered=gathered,
        gaps=GAPS[platform],
    )
