"""A config as numbers: the arrays of its state, the widths of its layers, the FLOPs of a token.

The state is that of `make_steps`, traced once on a mesh of one device. That trace names the mesh
axes that cut each array, so a mesh of any sizes then divides. Sizes are those of the whole job,
unless a name says otherwise.
"""

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import jax

from gpt_jax import config as configs, sharding
from gpt_jax.data import Spec, resolve_tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.model import FFNS, count_params, describe_parameter
from gpt_jax.run import make_steps, take_model, token_flops

# Roles of arrays by the model's roles of parameters. All others are "layer".
ROLES = {
    "expert": "expert",
    "embedding": "embed",
    "value_embedding": "value_embed",
    "head": "head",
}
# The arithmetic goes through the layers one by one, for each of hundreds of meshes.
MOST_LAYERS = 512
HALF_BYTES = 2  # Of an entry in bfloat16.
FULL_BYTES = 4  # Of an entry in float32.


class Array(NamedTuple):
    """Arrays of the state that are cut alike."""

    part: str  # It is "params", "opt", "host" (moments there), "ema" or "rest".
    role: str  # It is "layer", or a value of ROLES.
    axes: tuple[str, ...]  # Mesh axes that cut it under ZeRO-3.
    stacked: bool  # Its first dim is layers, which the stages of a pipeline share.
    itemsize: int


class Widths(NamedTuple):
    """Channels of one layer for a token."""

    q: int
    kv: int
    inner: int  # What the first matmuls of the feed-forward give, over all experts of a token.
    hidden: int  # What goes into its last matmul, over all experts of a token.
    ffn: str  # The activation of the feed-forward.
    sent: int  # Experts that the token is sent to; 0 in a dense layer.


class PlanJob(NamedTuple):
    """A job as the arithmetic sees it."""

    config: configs.Config  # Resolved.
    state: dict[Array, int]  # Entries by kind of array.
    layers: tuple[Widths, ...]
    parameters: int
    matmul_params: int  # Parameters that a token is multiplied with.
    full_flops: int  # Of a token, with the full attention map.
    causal_flops: int  # Of a token, with the keys that causal order leaves.


@cache
def group_layers(layers: tuple[Widths, ...]) -> tuple[tuple[Widths, int], ...]:
    """Returns the different layers, and how many there are of each.

    They are cached, because a search goes through them thousands of times.
    """
    return tuple(Counter(layers).items())


def compute_bytes(job: PlanJob) -> int:
    """Returns the bytes of one entry of what is multiplied."""
    return HALF_BYTES if job.config.compute.dtype == "bfloat16" else FULL_BYTES


def gradient_bytes(job: PlanJob) -> int:
    """Returns the bytes of one entry of a weight's gradient, until devices have summed it."""
    return HALF_BYTES if job.config.compute.gradient_dtype == "bfloat16" else FULL_BYTES


def resolve_vocab(config: configs.Config) -> configs.Config:
    """Returns the resolved config, whose vocabulary comes from the config or from the tokenizer.

    The model is that of the weights which the run starts from, if the config says so. A plan reads
    no text. Raises UsageError if the vocabulary's size depends on the text.
    """
    config = take_model(config, None)
    if config.model.vocab:
        return configs.resolve(config)

    text = config.data.tokenizer
    tokenizer = resolve_tokenizer(text)
    if text and not isinstance(tokenizer, Spec):
        return configs.resolve(config, tokenizer.vocab)
    if isinstance(tokenizer, Spec) and tokenizer.vocab:
        return configs.resolve(config, tokenizer.vocab + len(tokenizer.specials))

    reason = f"{text!r} is made of the text"
    if not text:
        reason = "'' means that of the prepared folder or token files, else bytes"
    raise UsageError(
        "config.model.vocab = 0: a plan reads no text, "
        f"and config.data.tokenizer = {reason}; set config.model.vocab to its size "
        "(`gpt-jax train` prints it), or config.data.tokenizer"
    )


def make_job(config: configs.Config) -> PlanJob:
    """Traces the state of `config`, in 3 s for the largest presets.

    Raises UsageError if the vocabulary has no size, if fields of the model do not agree, or if
    there are more than MOST_LAYERS layers.
    """
    if config.model.layers > MOST_LAYERS:
        raise UsageError(
            f"config.model.layers = {config.model.layers}: "
            f"a plan takes {MOST_LAYERS:,} at most; lower it"
        )
    config = resolve_vocab(config)
    faults = configs.faults(config)
    if faults:
        raise UsageError("; and ".join(faults))

    counts = count_params(config.model)
    full_flops, causal_flops = token_flops(config, counts["matmul"])
    return PlanJob(
        config,
        state=_trace_state(config),
        layers=tuple(
            _find_widths(config.model, spec) for spec in configs.layer_specs(config.model)
        ),
        parameters=counts["total"],
        matmul_params=counts["matmul"],
        full_flops=full_flops,
        causal_flops=causal_flops,
    )


def _trace_state(config: configs.Config) -> dict[Array, int]:
    """Returns the entries of each kind of array. One device has no mesh axes to disagree with."""
    if config.lora.rank:
        raise UsageError(
            f"config.lora.rank = {config.lora.rank}: a plan does not count the weights beneath "
            "adapters yet; plan with config.lora.rank=0, which needs more memory"
        )
    compute = replace(config.compute, kernel="reference")
    alone = replace(config, compute=compute, mesh=configs.Mesh(data=1))
    steps = make_steps(alone, sharding.make_mesh({}, jax.devices()[:1]))

    state: Counter = Counter()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(steps.abstract):
        state[_describe_array(sharding.join_path(keys), leaf)] += leaf.size
    return dict(state)


def _describe_array(path: str, leaf) -> Array:
    axes = []
    for entry in leaf.sharding.spec:
        if isinstance(entry, str):
            axes.append(entry)
        elif entry:
            axes += entry

    part = path.split("/")[0]
    if sharding.is_on_host(leaf):
        part = "host"
    role = "layer"
    stacked = False
    try:
        parameter = describe_parameter(path)
        role = ROLES.get(parameter.role, "layer")
        stacked = parameter.stacked
    except KeyError:
        pass  # A counter, for instance, belongs to no parameter.

    return Array(
        part=part if part in ("params", "opt", "host", "ema") else "rest",
        role=role,
        axes=tuple(sorted(axes)),
        stacked=stacked,
        itemsize=leaf.dtype.itemsize,
    )


def _find_widths(model: configs.Model, spec: configs.LayerSpec) -> Widths:
    def count_inputs(ffn: str) -> int:
        """Returns the matmuls that the feed-forward begins with: two if it has a gate."""
        return 1 + FFNS[ffn][1]

    q = model.heads * model.head_dim
    kv = model.kv_heads * model.head_dim
    if spec.ffn != "moe":
        return Widths(q, kv, count_inputs(spec.ffn) * model.mlp, model.mlp, spec.ffn, sent=0)

    hidden = (model.experts_per_token + model.shared_experts) * model.expert_mlp
    inner = count_inputs(model.expert_ffn) * hidden
    return Widths(q, kv, inner, hidden, model.expert_ffn, sent=model.experts_per_token)


def count_shares(array: Array, shape: dict[str, int], zero: int = 3) -> int:
    """Returns how many devices share an array on a mesh of these axis sizes."""
    # ZeRO-1 keeps the parameters whole, except that experts are cut over their own axis.
    dropped = configs.FSDP_AXES if zero == 1 and array.part in ("params", "ema") else ()
    stages = shape["pipeline"] if array.stacked else 1
    shares = [
        shape[axis]
        for axis in array.axes
        if axis not in dropped or (axis == "expert" and array.role == "expert")
    ]
    return math.prod(shares) * stages


def device_bytes(
    job: PlanJob,
    shape: dict[str, int],
    part: str,
    zero: int = 3,
    role: str = "",
    bytes_each: int = 0,
) -> float:
    """Returns the bytes on one device of a part of the state, or of one role of it.

    `bytes_each` stands for an entry's bytes in place of the arrays' own size.
    """
    return sum(
        size * (bytes_each or array.itemsize) / count_shares(array, shape, zero)
        for array, size in job.state.items()
        if array.part == part and (not role or array.role == role)
    )
