"""A config as numbers: every array of its state with the mesh axes that cut it, widths of its
layers, FLOPs of a token (called by memory, traffic, roofline and search).

The state is that of experiment.make_steps, traced once on a mesh of one device, which names the
axes all the same; a mesh of any sizes then divides. Sizes are in entries or bytes of the whole job
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
from gpt_jax.model import FFNS, count_params
from gpt_jax.run import make_steps, token_flops

MOST_LAYERS = 512  # the arithmetic goes through them one by one, for each of hundreds of meshes


class Array(NamedTuple):
    """Arrays of the state that are cut alike. `part`: params, opt, ema or rest; `axes`: that cut
    them under ZeRO-3; `stacked`: layers first, which stages of a pipeline share; `role`: layer,
    expert, embed or head."""

    part: str
    role: str
    axes: tuple[str, ...]
    stacked: bool
    itemsize: int


class Widths(NamedTuple):
    """Channels of one layer for a token. `inner`: what the feed-forward's first matmuls give;
    `hidden`: what goes into the last; both over all experts that a token sees; `ffn`: its
    activation; `sent`: experts that it is sent to."""

    q: int
    kv: int
    inner: int
    hidden: int
    ffn: str
    sent: int


class PlanJob(NamedTuple):
    """`config`: resolved. `state`: entries of each kind of array; `parameters`: entries in all,
    `matmul_params`: those that are multiplied."""

    config: configs.Config
    state: dict[Array, int]
    layers: tuple[Widths, ...]
    parameters: int
    matmul_params: int
    full_flops: int  # of a token
    causal_flops: int


@cache
def kinds(layers: tuple[Widths, ...]) -> tuple[tuple[Widths, int], ...]:
    """Different layers, and how many of each: a search goes through them thousands of times."""
    return tuple(Counter(layers).items())


def resolve_vocab(config: configs.Config) -> configs.Config:
    """The resolved config. A plan reads no text: the vocabulary is in the config, or what
    `data.tokenizer` says by itself."""
    if config.model.vocab:
        return configs.resolve(config)
    text = config.data.tokenizer
    tokenizer = resolve_tokenizer(text)
    is_spec = isinstance(tokenizer, Spec)
    if is_spec and tokenizer.vocab:
        return configs.resolve(config, tokenizer.vocab + len(tokenizer.specials))
    if is_spec or not text:
        why = (
            f"{text!r} is made of the text"
            if text
            else "'' means that of the prepared folder or token files, else bytes"
        )
        raise UsageError(
            f"config.model.vocab = 0: a plan reads no text, and config.data.tokenizer = {why}; set "
            "config.model.vocab to its size (`gpt-jax train` prints it), or config.data.tokenizer"
        )
    return configs.resolve(config, tokenizer.vocab)


def _role(path: str) -> str:
    if "/experts/" in path:
        return "expert"
    if path.split("/", 1)[-1].startswith("embed/") or "/embed/" in path:
        return "embed"
    return "head" if "head/" in path else "layer"


def _array(path: str, leaf) -> Array:
    part = path.split("/")[0]
    names = [
        name
        for part_of in leaf.sharding.spec
        if part_of
        for name in ((part_of,) if isinstance(part_of, str) else part_of)
    ]
    role = _role(path)
    return Array(
        part if part in ("params", "opt", "ema") else "rest",
        role,
        tuple(sorted(names)),
        "/blocks/" in path,
        leaf.dtype.itemsize,
    )


def _widths(model: configs.Model, spec) -> Widths:
    def gates(name):
        return 1 + FFNS[name][1]

    q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
    if spec.ffn != "moe":
        return Widths(q, kv, gates(spec.ffn) * model.mlp, model.mlp, spec.ffn, 0)
    seen = model.experts_per_token + model.shared_experts
    return Widths(
        q,
        kv,
        seen * gates(model.expert_ffn) * model.expert_mlp,
        seen * model.expert_mlp,
        model.expert_ffn,
        model.experts_per_token,
    )


def make_job(config: configs.Config) -> PlanJob:
    """Traces the state of `config` (3 s for the largest presets). UsageError for what has no
    size, for a mistake of one, and for a model that is none."""
    if config.model.layers > MOST_LAYERS:
        raise UsageError(
            f"config.model.layers = {config.model.layers}: a plan takes {MOST_LAYERS:,} at most; lower it"
        )
    config = resolve_vocab(config)
    if found := configs.faults(config):
        raise UsageError("; and ".join(found))
    traced = replace(
        config, compute=replace(config.compute, kernel="reference"), mesh=configs.Mesh(data=1)
    )
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    steps = make_steps(traced, mesh)
    state: Counter = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(steps.abstract):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        state[_array(name, leaf)] += leaf.size
    counts = count_params(config.model)
    full, causal = token_flops(config, counts["matmul"])
    layers = tuple(_widths(config.model, spec) for spec in configs.layer_specs(config.model))
    return PlanJob(config, dict(state), layers, counts["total"], counts["matmul"], full, causal)


def pieces(array: Array, shape: dict[str, int], zero: int = 3) -> int:
    """Devices' shares into which an array is cut on a mesh of these axis sizes."""
    dropped = configs.FSDP_AXES if zero == 1 and array.part in ("params", "ema") else ()
    kept = [
        axis
        for axis in array.axes
        if axis not in dropped or (axis == "expert" and array.role == "expert")
    ]
    return math.prod(shape[axis] for axis in kept) * (shape["pipeline"] if array.stacked else 1)


def device_bytes(
    job: PlanJob,
    shape: dict[str, int],
    part: str,
    zero: int = 3,
    role: str = "",
    bytes_each: int = 0,
) -> float:
    """Bytes on one device of a part of the state (`bytes_each`: instead of the arrays' own
    size)."""
    return sum(
        size * (bytes_each or array.itemsize) / pieces(array, shape, zero)
        for array, size in job.state.items()
        if array.part == part and (not role or array.role == role)
    )
