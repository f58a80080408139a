"""Train an architecture of your own: a recurrent network in plain JAX, without attention.

    python examples/own_architecture.py

The train step knows no model. It takes a `Network`, which is four functions, and any nested dict
of parameters. Optimiser, schedule, accumulation, loss and metrics are those of gpt_jax.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import config as configs, data, metrics, train

WIDTH, LAYERS = 96, 2


def init_params(key: jax.Array, vocab: int) -> dict:
    """A nested dict of float32 arrays. Optimiser groups find them by path, as in `layers/0/in`."""

    def normal(number: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, number), shape) / shape[0] ** 0.5

    layers = {
        str(i): {"in": normal(10 + i, WIDTH, 3 * WIDTH), "out": normal(20 + i, WIDTH, WIDTH)}
        for i in range(LAYERS)
    }
    return {"embed": 0.02 * normal(0, vocab, WIDTH), "layers": layers}


def recur(layer: dict, x: jax.Array) -> jax.Array:
    """x [B, T, D] -> [B, T, D] by a gated recurrence: h_t = a_t * h_{t-1} + (1 - a_t) * v_t."""
    gate, value, output = jnp.split(x @ layer["in"], 3, axis=-1)
    keep = jax.nn.sigmoid(gate + 2)

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    _, state = jax.lax.associative_scan(combine, (keep, (1 - keep) * value), axis=1)
    return (state * jax.nn.silu(output)) @ layer["out"]


def normalize(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def features(params: dict, batch: dict, key) -> tuple[jax.Array, dict]:
    """(hidden states [B, T, D], what layers report: nothing)."""
    x = params["embed"][batch["tokens"]]
    for i in range(LAYERS):
        x = x + recur(params["layers"][str(i)], normalize(x))
    return normalize(x), {}


class Traits(NamedTuple):
    """What the optimiser asks about a parameter. Muon, for instance, takes each "matrix"."""

    role: str
    stacked: bool = False


def describe(path: str) -> Traits:
    return Traits("embedding" if path == "embed" else "matrix")


NETWORK = train.Network(
    features,
    head=lambda params, dtype: params["embed"].T.astype(dtype),
    logits=lambda head, hidden: hidden @ head,
    describe=describe,
)


def main(steps: int = 200) -> list[float]:
    """Trains on this repository's own pages and returns the loss of each step."""
    pages = Path(__file__).resolve().parents[1] / "docs"
    text = configs.Data(path=(str(pages),), tokenizer="bytes", eval_fraction=0.0)
    knobs = configs.Train(steps=steps, batch_size=8, seq_len=128)
    optim = configs.Optim(learning_rate=1e-2, warmup_steps=10, decay_steps=steps)

    dataset = data.load_dataset(text, print)
    rows = data.make_examples(dataset, text, knobs.seq_len, seed=0)
    stream = data.make_stream(rows, knobs.batch_size, slice(0, knobs.batch_size))
    params = init_params(jax.random.key(0), dataset.tokenizer.vocab)
    optimizer = train.make_optimizer(optim, params, describe)
    state = train.init_state(params, optimizer, knobs)
    update = partial(train.train_step, network=NETWORK, tx=optimizer, train=knobs)
    update = jax.jit(update, donate_argnums=0)

    losses = []
    for step in range(steps):
        state, sums = update(state, {}, next(stream), jax.random.key(1))
        losses.append(metrics.divide_sums(jax.device_get(sums))["loss"])
        if step % 50 == 49:
            print(f"step {step + 1}: {losses[-1]:.3f} nats a byte")
    stream.close()
    return losses


if __name__ == "__main__":
    main()
