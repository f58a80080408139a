"""A tiny model of each kind, trained for a few steps without a mesh and on any mesh."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from gpt_jax import config
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.model.transformer import abstract_params
from gpt_jax.run import parts as run_parts
from gpt_jax.sharding import layout
from gpt_jax.train.optim.optimizer import make_optimizer, make_zero1
from gpt_jax.train.step import init_state, train_step

ROWS, LENGTH, VOCAB, STEPS = 16, 16, 48, 10
BATCH, FSDP = config.BATCH_AXES, config.FSDP_AXES
TRAIN = config.Train(seq_len=LENGTH, batch_size=ROWS, z_loss=1e-3, label_smoothing=0.1)
MODERN = dict(
    layers=5,
    kv_heads=4,
    norm="plain_rmsnorm",
    position="rotary",
    embed_norm=True,
    tied=False,
    bias=False,
    pattern=(("attention", "swiglu"),),
    qk_norm=True,
    qk_norm_after_rope=True,
    logit_softcap=15.0,
    value_embed=True,
    residual_scalars=True,
    smear=True,
    smear_gate=5,
    backout=True,
    init="modern",
)
MODELS = {
    "gpt2": dict(layers=4, windows=(3,)),  # on packed rows
    "modern": MODERN,
    "tail": dict(
        layers=3,
        kv_heads=4,
        windows=(3, 3, 0),
        norm="rmsnorm",
        position="rotary",
        pattern=(("attention", "swiglu"),),
        bias=False,
    ),
    "dropout": MODERN | dict(layers=3, dropout=0.1, attention_dropout=0.1),
    "moe": dict(
        layers=4,
        norm="rmsnorm",
        position="rotary",
        bias=False,
        windows=(5, 0),
        pattern=(("attention", "swiglu"), ("attention", "moe")),
        experts=8,
        expert_mlp=16,
        shared_experts=1,
        router_z_loss=1e-3,
    ),  # on packed rows
    "bias": dict(
        layers=2,
        norm="rmsnorm",
        position="rotary",
        bias=False,
        pattern=(("attention", "moe"),),
        experts=8,
        expert_mlp=16,
        balance="bias",
        router="sigmoid",
        dispatch="capacity",
    ),
    "gemma3": dict(
        layers=4,
        kv_heads=4,
        norm="unit_rmsnorm",
        norm_position="sandwich",
        position="rotary",
        rope_local_base=20.0,
        rope_scaling="linear",
        rope_scale_factor=3.0,
        windows=(5, 0),
        pattern=(("attention", "geglu"),),
        attention_scale=0.3,
        embed_scale=5.0,
        qk_norm=True,
        bias=False,
        biased="qkv",
    ),  # on packed rows
    "olmo2": dict(
        layers=4,
        kv_heads=4,
        norm="rmsnorm",
        norm_position="branch",
        position="rotary",
        rope_local_base=20.0,
        windows=(0, 7),
        pattern=(("attention", "swiglu"),),
        qk_norm=True,
        qk_norm_over="all",
        tied=False,
        bias=False,
        biased="mlp",
    ),
}
PACKED = ("gpt2", "moe", "gemma3")
OPTIMIZERS = {
    "adamw": config.Optim(
        schedule="constant", clip=0.0, weight_decay=1e-4, learning_rate=1e-3, b1=0.5, eps=1e-6
    ),  # neither lifts rounding noise much
    "muon": config.Optim(
        optimizer="muon", schedule="constant", learning_rate=3e-3, b1=0.5, eps=1e-6
    ),
    "adafactor": config.Optim(optimizer="adafactor", schedule="constant", learning_rate=1e-2),
}


def make_config(name: str, **knobs) -> config.Config:
    """The resolved config of a model.

    `knobs` are fields of Model, Compute and Train, and `zero`.
    """

    def of(kind):
        return {key: value for key, value in knobs.items() if key in kind.__dataclass_fields__}

    model = config.Model(**dict(embed=32, heads=8, vocab=VOCAB) | MODELS[name] | of(config.Model))
    return config.resolve(
        config.Config(
            model=model,
            compute=config.Compute(**dict(kernel="reference") | of(config.Compute)),
            train=replace(TRAIN, **of(config.Train)),
            mesh=config.Mesh(zero=knobs.get("zero", 3)),
        )
    )


def make_model(name: str, **knobs) -> config.Model:
    return make_config(name, **knobs).model


def random_params(name):
    """Normal draws in numpy. They are the same on every mesh, and no zero can hide a wrong sum."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.float32(0.2 * rng.standard_normal(x.shape)), abstract_params(make_model(name))
    )


def make_columns(name):
    """Rows of which some learn much and some little.

    The models in PACKED have segments and positions.
    """
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1))
    weight = (rng.random((ROWS, LENGTH)) < rng.random((ROWS, 1))).astype(np.float32)
    out = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weight": weight,
        "bytes": rng.integers(1, 5, (ROWS, LENGTH)),
    }
    if name in PACKED:
        first = LENGTH // 2 - 1
        out |= {
            "segment": np.tile([1] * first + [2] * (LENGTH - first), (ROWS, 1)),
            "position": np.tile([*range(first), *range(LENGTH - first)], (ROWS, 1)),
        }
    return out


def remember() -> optax.GradientTransformation:
    """Passes gradients on and keeps the last ones as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda g, s, p=None: (g, g)
    )


def run(name, columns, place, settings, optimizer="adamw"):
    """Per-step metrics of STEPS updates, the first gradient and the last state."""
    model, train, key = settings.model, settings.train, jax.random.key(3)
    like = abstract_params(model)
    tx = optax.chain(remember(), make_optimizer(OPTIMIZERS[optimizer], like, describe_parameter))
    params = place(random_params(name))
    if settings.mesh.zero == 1:
        tx, params = (
            make_zero1(tx, partial(layout.lay_out_like, like=like), layout.gather_fsdp),
            layout.gather_fsdp(params),
        )
    state = init_state(params, tx, train)
    step = jax.jit(
        partial(
            train_step, network=run_parts.make_network(model, settings.compute), tx=tx, train=train
        )
    )
    sums, first = [], None
    for _ in range(STEPS):
        state, now = step(state, {}, columns, key)
        sums.append({name: np.asarray(a) / float(b) for name, (a, b) in now.items()})
        first = jax.tree.map(np.asarray, state.opt[0]) if first is None else first
    return sums, first, state


@cache
def alone(name, optimizer="adamw"):
    """The reference: no mesh, one microbatch, all logits at once, whole rows."""
    sums, first, state = run(name, make_columns(name), lambda p: p, make_config(name), optimizer)
    return sums, first, jax.tree.map(np.asarray, state.params)


def put(params, mesh, model):
    """Numpy parameters laid out as the model would make them on `mesh`."""
    return jax.tree.map(
        lambda x, like: jax.device_put(x, NamedSharding(mesh, like.sharding.spec)),
        params,
        abstract_params(model),
    )


def close(ours, theirs, rel=1e-5, floor=0.0):
    """Compares to `rel` of the largest entry, or of `floor`.

    The gradient of the key biases needs a floor, because it is zero but for rounding.
    """
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * max(np.abs(theirs).max(), floor))
