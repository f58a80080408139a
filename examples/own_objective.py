"""Train with an objective of your own: the focal loss, which cares less about what is easy already.

    python examples/own_objective.py

An objective runs the network on a batch, and returns sums with weights. Nothing is divided here:
sums are added over microbatches, chunks and devices first.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from gpt_jax import config as configs, data, metrics, run, sharding
from gpt_jax.train import OBJECTIVES, Readout, add_report, sum_cross_entropy, sum_logits

FOCUS = 2.0


def sum_focal(logits: jax.Array, columns: dict, train: configs.Train) -> dict:
    """Lin et al. 2017: cross-entropy times (1 - p)^2, p being the probability of the target."""
    sums = sum_cross_entropy(logits, columns, train)
    # The logit of the target by a comparison: a lookup would not work on a split vocabulary.
    vocab = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    at_target = jnp.where(vocab == columns["targets"][..., None], logits, 0.0).sum(-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - at_target

    hardness = (1 - jnp.exp(-loss)) ** FOCUS
    weight = columns["weight"]
    return sums | {"objective": ((hardness * loss * weight).sum(), weight.sum())}


def focal(network, params, frozen, batch: dict, key, train: configs.Train) -> dict:
    """Runs the network and reads logits from its hidden states, in chunks if the config says so."""
    hidden, report = network.features(params, batch, key)
    columns = {name: batch[name] for name in ("targets", "weight", "bytes")}
    token_sums = partial(sum_focal, train=train)
    sums = sum_logits(token_sums, columns, train.loss_chunk, Readout(network, params, hidden))
    return add_report(sums, report)


def main(steps: int = 200) -> list[dict[str, float]]:
    """Trains on this repository's own pages; returns objective, loss and accuracy of each step."""
    OBJECTIVES["focal"] = focal
    pages = Path(__file__).resolve().parents[1] / "docs"
    text = configs.Data(path=(str(pages),), tokenizer="bytes", eval_fraction=0.0)
    dataset = data.load_dataset(text, print)
    config = configs.Config(
        model=configs.Model(layers=2, embed=96, heads=4),
        compute=configs.Compute(kernel="blocked"),
        data=text,
        optim=configs.Optim(learning_rate=3e-3, warmup_steps=10),
        train=configs.Train(steps=steps, batch_size=8, seq_len=128),
    )
    config = configs.resolve(config, dataset.tokenizer.vocab)
    config = replace(config, train=replace(config.train, objective="focal"))

    mesh = sharding.make_mesh({}, jax.devices()[:1])
    rows = sharding.process_rows(mesh, config.train.batch_size)
    examples = data.make_examples(dataset, text, config.train.seq_len, config.seed)
    stream = data.make_stream(examples, config.train.batch_size, rows)
    history = []
    with jax.set_mesh(mesh):
        functions = run.make_steps(config, mesh)
        state = functions.make_state()
        for step in range(steps):
            batch = sharding.to_devices(mesh, next(stream), config.train.batch_size)
            state, sums = functions.train_step(state, batch)
            means = metrics.divide_sums(jax.device_get(sums))
            history.append({name: means[name] for name in ("objective", "loss", "accuracy")})
            if step % 50 == 49:
                print(f"step {step + 1}: {history[-1]}")
    stream.close()
    return history


if __name__ == "__main__":
    main()
