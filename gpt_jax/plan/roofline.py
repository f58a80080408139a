"""A step's time and memory by arithmetic, what bounds it, and whether it fits (called by search and
commands/plan.py).

step = (max(matmuls + passes over memory, hidden flows) + open flows) + update, where
- matmuls: FLOPs really done, what remat does again and a pipeline's idle ticks included, at
  EFFICIENCY of the peak;
- passes over memory: what is read and written between matmuls;
- flows (traffic.py): hidden ones run behind matmuls, open ones do not; flows over one axis share
  its links, other axes
  have their own;
- update: the optimiser reads and writes its state.
"""

from typing import NamedTuple

from gpt_jax import config as configs
from gpt_jax.errors import UsageError
from gpt_jax.hardware import GIB, GPU_FRACTION, mfu
from gpt_jax.model import choose_exchange, choose_kernel, make_problem, padded_exchange
from gpt_jax.plan.job import PlanJob, device_bytes, kinds
from gpt_jax.plan.memory import (
    FULL,
    Local,
    Memory,
    blockwise,
    compute_bytes,
    experts_bytes,
    local,
    memory,
    padding,
    spare,
    turns,
)
from gpt_jax.plan.topology import Topology
from gpt_jax.plan.traffic import Flow, Link, flows, link

# Assumed parts of the peak. Matmuls: a compiled 8,192-cubed one has 0.7 to 0.9 on TPUs by the
# compiler's own cycles (devices.py), and published runs stay below 0.8 of an H100's peak.
# Attention: splash and cuDNN, causal halves skipped.
EFFICIENCY = {"tpu": 0.85, "gpu": 0.75}
# Parts of the bf16 peak for `config.compute.dtype = "float32"`: by default XLA multiplies float32 in
# one pass of bfloat16 on a TPU, and as TF32 on a GPU, whose peak is half (data sheets of H100,
# H200, B200).
FLOAT32 = {"tpu": 1.0, "gpu": 0.5}
ATTENTION = {
    "splash": 0.45,
    "cudnn": 0.55,
    "ring": 0.2,
    "xla": 0.2,
    "reference": 0.2,
    "blocked": 0.2,
}
SKIPS = ("splash", "cudnn", "blocked", "ring")  # kernels that leave out what causal order rules out
# Times that arrays are read or written forward and backward: in a layer those as wide as the
# stream, those inside it (activations of the feed-forward, queries, keys and values), and maps of
# every query and key where a kernel makes them.
TOUCHES, INSIDE_TOUCHES, MAP_TOUCHES = 14.0, 3.0, 8.0
LOGITS_TOUCHES = 4.0  # float32 logits: made, read by the loss, their gradient made and read
UPDATE_TOUCHES = 2.0  # every array of the optimiser's is read and written


class Estimate(NamedTuple):
    """Seconds of one step by term, and what follows. `open` and `hidden`: flows by axis;
    `problems`: why it cannot run."""

    kernel: str
    reason: str  # why this attention kernel
    shape: dict[str, int]
    memory: Memory
    matmuls: float
    passes: float
    hidden: dict[str, float]
    open: dict[str, float]
    update: float
    bubble: float
    flows: tuple[tuple[Flow, Link], ...]
    step: float
    bound: str
    mfu_full: float
    mfu_causal: float
    fits: bool
    problems: tuple[str, ...]


def find_problems(config: configs.Config, devices: int) -> tuple[dict[str, int] | None, list[str]]:
    """The mesh's axis sizes (None: there is no such mesh) and every disagreement of the config's
    fields on it."""
    try:
        shape = configs.shape_on(config, devices)
    except UsageError as error:
        return None, [str(error)]
    return shape, configs.problems(config, shape)


def multiply_peak(job: PlanJob, topology: Topology) -> float:
    """FLOP/s of one device in the dtype that is multiplied."""
    full = job.config.compute.dtype == "float32"
    return topology.peak * (FLOAT32[topology.chip.platform] if full else 1.0)


def attention_flops(job: PlanJob, kernel: str) -> float:
    """Of a token's attention, forward and backward, as `kernel` computes it."""
    return (job.causal_flops if kernel in SKIPS else job.full_flops) - 6 * job.matmul_params


def _again(job: PlanJob) -> tuple[float, float]:
    """FLOPs done over FLOPs counted, (matmuls of layers, attention): recomputing adds a forward
    pass to three."""
    sent = any(widths.sent for widths in job.layers)  # whose matmuls `dots` does not keep
    matmuls = {"none": 1.0, "block": 4 / 3, "offload": 1.0, "dots": 4 / 3 if sent else 1.0}[
        job.config.compute.remat
    ]
    return matmuls, 1.0 if job.config.compute.remat == "none" else 4 / 3


def attention_seconds(job: PlanJob, topology: Topology, kernel: str, here: Local) -> float:
    """Attention's scores and sums on one device in a step."""
    tokens = job.config.train.batch_size * job.config.train.seq_len / topology.devices
    flops = attention_flops(job, kernel) * _again(job)[1] * _idle(job, here)
    return tokens * flops / multiply_peak(job, topology) / ATTENTION[kernel]


def _idle(job: PlanJob, here: Local) -> float:
    """Work done over work there is: a pipeline computes in its bubble too."""
    return here.ticks * here.tick_tokens * here.tick_layers / (here.tokens * len(job.layers))


def _wasted(job: PlanJob, shape: dict[str, int], here: Local, platform: str) -> float:
    """Entries of experts' matrices that a token is multiplied with for nothing: rows beyond a
    capacity's choices, half of each expert's last block."""
    model = job.config.model
    times = (
        max(0.0, model.capacity_factor - 1)
        if model.dispatch == "capacity"
        else padding(model, shape, here.tick_tokens, platform) / 2
    )
    return times * sum(
        w.sent / (w.sent + model.shared_experts) * (w.inner + w.hidden) * model.embed * count
        for w, count in kinds(job.layers)
        if w.sent
    )


def compute_seconds(
    job: PlanJob, topology: Topology, kernel: str, shape: dict[str, int], here: Local
) -> float:
    """Matmuls and attention of one device in a step."""
    model, train = job.config.model, job.config.train
    tokens = train.batch_size * train.seq_len / topology.devices
    head = (
        6 * model.vocab * model.embed * (4 / 3 if train.loss_chunk else 1.0)
    )  # chunks make their logits twice
    matrices = (
        job.matmul_params
        - model.vocab * model.embed
        + _wasted(job, shape, here, topology.chip.platform)
    )
    layers = 6 * matrices * _again(job)[0] * _idle(job, here)
    return matmul_seconds(job, topology, tokens * (layers + head)) + attention_seconds(
        job, topology, kernel, here
    )


def matmul_seconds(job: PlanJob, topology: Topology, flops: float) -> float:
    return flops / multiply_peak(job, topology) / EFFICIENCY[topology.chip.platform]


def passes_seconds(
    job: PlanJob, topology: Topology, kernel: str, shape: dict[str, int], here: Local
) -> float:
    """Norms, residuals, activations, experts' rows: arrays read and written between matmuls;
    weights are read by the matmuls themselves."""
    model, train, platform = job.config.model, job.config.train, topology.chip.platform

    def mean(of):
        return sum(of(widths) * count for widths, count in kinds(job.layers)) / len(job.layers)

    wide = model.embed / (shape["tensor"] if job.config.compute.shard_sequence else 1)
    wide += model.embed * spare(model, shape, here.tick_tokens, platform) * mean(lambda w: w.sent)
    inner = mean(lambda w: w.inner + w.hidden + 2 * w.q) / shape["tensor"]
    a_token = compute_bytes(job) * (TOUCHES * wide + INSIDE_TOUCHES * inner)
    layers = (
        here.ticks
        * here.tick_layers
        * (here.tick_tokens * a_token + _sums_bytes(job, shape, here, platform))
    )
    if kernel in ("reference", "xla"):  # which make whole maps, in float32
        layers += (
            here.tokens
            * len(job.layers)
            * MAP_TOUCHES
            * model.heads
            / shape["tensor"]
            * train.seq_len
            * FULL
        )
    logits = LOGITS_TOUCHES * here.tokens * model.vocab / shape["tensor"] * FULL
    return (layers + logits) * train.accumulate / topology.chip.bandwidth


def _sums_bytes(job: PlanJob, shape: dict[str, int], here: Local, platform: str) -> float:
    """Of a layer's microbatch where experts are gone through block by block: their gradients in
    float32 are read and written once a block."""
    if not blockwise(job.config.model, platform):
        return 0.0
    return (
        2
        * experts_bytes(job, shape, FULL)
        / len(job.layers)
        * turns(job, shape, here.tick_tokens, platform)
    )


def update_seconds(job: PlanJob, topology: Topology, shape: dict[str, int]) -> float:
    state = sum(device_bytes(job, shape, part) for part in ("params", "opt", "ema"))
    return (UPDATE_TOUCHES * state + device_bytes(job, shape, "params")) / topology.chip.bandwidth


def choose_plan_kernel(
    config: configs.Config, topology: Topology, shape: dict[str, int]
) -> tuple[str, str]:
    """(attention kernel, why) as a run on this machine would choose. UsageError where there is
    none."""
    model = config.model
    return choose_kernel(
        config.compute.kernel,
        make_problem(
            model,
            config.compute.dtype,
            config.train.seq_len,
            topology.chip.platform,
            context=shape["context"],
        ),
    )


def estimate_job(job: PlanJob, topology: Topology) -> Estimate:
    """Everything about `job` on `topology`. Raises UsageError only when there is no mesh to
    speak of."""
    config = job.config
    shape, found = find_problems(config, topology.devices)
    if shape is None:
        raise UsageError(found[0])
    across = configs.cross_slice(config.mesh)
    if topology.chip.platform == "tpu" and (
        text := configs.slices_problem(across, topology.slices)
    ):
        found = [text, *found]
    try:
        kernel, reason = choose_plan_kernel(config, topology, shape)
    except UsageError as error:
        kernel, reason, found = "reference", "none can", [*found, str(error)]
    here = local(job, shape)
    compute = compute_seconds(job, topology, kernel, shape, here)
    passes = passes_seconds(job, topology, kernel, shape, here)
    update = update_seconds(job, topology, shape)
    padded = choose_exchange(topology.chip.kind) is padded_exchange
    found_flows = [
        (flow, link(topology, shape, across, flow.axis))
        for flow in flows(job, shape, topology.chip.platform, padded)
    ]
    hidden, open_ = (
        {
            axis: seconds
            for axis in configs.AXES
            if (
                seconds := sum(
                    flow.bytes / line.speed
                    for flow, line in found_flows
                    if flow.axis == axis and flow.hidden == kind
                )
            )
        }
        for kind in (True, False)
    )
    behind, before = max(hidden.values(), default=0.0), sum(open_.values())
    step = max(compute + passes, behind) + before + update
    terms = {"matmuls": compute, "memory bandwidth": passes + update} | {
        f"the links of axis {axis}": hidden.get(axis, 0) + open_.get(axis, 0)
        for axis in {*hidden, *open_}
    }
    used = memory(job, shape, kernel, topology.chip.platform)
    tokens = config.train.batch_size * config.train.seq_len / step
    stages = shape["pipeline"]
    return Estimate(
        kernel=kernel,
        reason=reason,
        shape=shape,
        memory=used,
        matmuls=compute,
        passes=passes,
        hidden=hidden,
        open=open_,
        update=update,
        bubble=(stages - 1) / here.ticks if stages > 1 else 0.0,
        flows=tuple(found_flows),
        step=step,
        bound=max(terms, key=terms.get),
        mfu_full=mfu(job.full_flops, tokens, topology.peak * topology.devices),
        mfu_causal=mfu(job.causal_flops, tokens, topology.peak * topology.devices),
        fits=used.peak <= topology.chip.memory,
        problems=tuple(found),
    )


def format_verdict(peak: float, topology: Topology) -> str:
    """ "fits: peak 31.2 of 95.7 GiB"; of GPUs also which part of the card that is."""
    fits = "fits" if peak <= topology.chip.memory else "does not fit"
    part = f" ({GPU_FRACTION} of the card)" if topology.chip.platform == "gpu" else ""
    used = f"{peak / GIB:{'.1f' if peak >= GIB / 10 else '.2g'}}"
    return f"{fits}: peak {used} of {topology.chip.memory / GIB:.1f} GiB{part}"
