"""What remat `names` keeps of a layer on the device and on the host, and what it computes again."""

from gpt_jax import config as configs
from gpt_jax.model import FFNS, KERNELS
from gpt_jax.plan.experts import is_blockwise
from gpt_jax.plan.job import FULL_BYTES, PlanJob, Widths, compute_bytes, group_layers
from gpt_jax.plan.microbatch import stream_bytes

# What remat `offload` sends to the host: results of the matmuls that the backward pass reads.
OFFLOADED = ("q", "k", "v", "attention_out", "mlp_in")


def value_bytes(
    job: PlanJob, widths: Widths, shape: dict[str, int], kernel: str
) -> dict[str, float]:
    """Returns the bytes of a token in one layer on a device, for each name that the layer has.

    `widths` are those of the buffers (see widen_for_buffers).
    """
    model = job.config.model
    entry = compute_bytes(job)
    stream = stream_bytes(job, shape)
    cut = entry / shape["tensor"]
    sums = model.heads * FULL_BYTES / shape["tensor"] if KERNELS[kernel].keeps_result else 0.0
    values = {
        "layer_in": stream,
        "q": widths.q * cut,
        "k": widths.kv * cut,
        "v": widths.kv * cut,
        "attention": widths.q * cut + sums,
        "attention_out": stream,
    }

    inner, hidden = _find_dense(model, widths)
    if hidden:
        values |= {"mlp_in": inner * cut, "mlp_hidden": hidden * cut, "mlp_out": stream}
    if widths.sent:
        # Rows for experts are whole on each device of the axis tensor.
        rows = widths.sent * model.embed * entry
        values |= {"experts_in": rows, "experts_out": rows}
    return values


def _find_dense(model: configs.Model, widths: Widths) -> tuple[float, float]:
    """Returns the (inner, hidden) channels of a layer's dense feed-forward or shared experts."""
    if not widths.sent:
        return widths.inner, widths.hidden
    hidden = model.shared_experts * model.expert_mlp
    return (1 + FFNS[model.expert_ffn][1]) * hidden, hidden


def saved_bytes(job: PlanJob, widths: Widths, shape: dict[str, int], kernel: str) -> float:
    """Returns the bytes of a token that remat `names` keeps in one layer on a device."""
    values = value_bytes(job, widths, shape, kernel)
    compute = job.config.compute
    saved = sum(values.get(name, 0.0) for name in compute.remat_save)
    return saved if "layer_in" in compute.remat_offload else saved + values["layer_in"]


def host_bytes(job: PlanJob, widths: Widths, shape: dict[str, int], kernel: str) -> float:
    """Returns the bytes of a token that one layer of a device leaves in the memory of the host."""
    compute = job.config.compute
    offloaded = {"names": compute.remat_offload, "offload": OFFLOADED}.get(compute.remat, ())
    values = value_bytes(job, widths, shape, kernel)
    # The policy `offload` takes no grouped matmuls, and so none of experts.
    return sum(values.get(name, 0.0) for name in offloaded)


def is_recomputed(compute: configs.Compute, name: str) -> bool:
    """Returns whether the backward pass computes a value with this name again.

    `dots` keeps what the names stand for, except what belongs to experts.
    """
    if compute.remat == "names":
        return name not in (*compute.remat_save, *compute.remat_offload)
    return compute.remat in ("block", "offload")


def repeated_part(job: PlanJob, platform: str) -> float:
    """Returns the part of the layers' forward matmuls that remat `names` computes again."""
    total = 0.0
    repeated = 0.0
    for widths, count in group_layers(job.layers):
        for name, entries in _list_matmuls(job.config, widths, platform):
            total += entries * count
            if _is_needed(job.config, name):
                repeated += entries * count
    return repeated / total


def _list_matmuls(config: configs.Config, widths: Widths, platform: str) -> list[tuple[str, float]]:
    """Returns the matmuls of a layer: (name of the result, channels that come in and go out).

    The first matmuls of experts have no name, and go by blocks together with the last one.
    """
    inner, hidden = _find_dense(config.model, widths)
    first = "experts_out" if is_blockwise(config, platform) else ""
    return [
        ("q", widths.q),
        ("k", widths.kv),
        ("v", widths.kv),
        ("attention_out", widths.q),
        ("mlp_in", inner),
        ("mlp_out", hidden),
        (first, widths.inner - inner if widths.sent else 0.0),
        ("experts_out", widths.hidden - hidden if widths.sent else 0.0),
    ]


def _is_needed(config: configs.Config, name: str) -> bool:
    """Returns whether the backward pass reads a result that is not there."""
    if name in configs.list_unread(config.model):
        return False
    return is_recomputed(config.compute, name)
