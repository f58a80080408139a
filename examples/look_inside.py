# %% [markdown]
# # Look inside a model
#
# What would the model say if it stopped after layer 1, 2, 3 …? This reads the residual stream after
# each layer through the output matrix (the "logit lens" of nostalgebraist, 2020).
#
#     python examples/look_inside.py --checkpoint=runs/quickstart --text='def read_'
#
# Editors that know `# %%` show this file as a notebook.

# %%
import argparse

import jax
import jax.numpy as jnp

from gpt_jax import model as models, run

# %% [markdown]
# `capture` gives values of the forward pass by name, and the model is not edited for that. Every
# block keeps its output under the name `residual`. A stack of layers is scanned over its repeats,
# so the arrays of `blocks/0, blocks/1, …` are interleaved. `list_layers` puts them in order.


# %%
def residual_streams(
    network: models.Transformer, params: dict, tokens: jax.Array
) -> list[jax.Array]:
    """The stream [B, T, D] after each layer, for tokens [B, T]."""
    names = ("*/residual",)  # also `blocks/0/mlp`, `blocks/*/attention/weights`, …
    values = models.capture(network.model, network.compute, params, {"tokens": tokens}, names)
    return models.list_layers(values, "residual")


def read_out(network: models.Transformer, params: dict, stream: jax.Array) -> jax.Array:
    """Logits [B, T, V] of a stream, through the final norm and the output matrix."""

    def unembed(module, x):
        return module.unembed(module.final_norm(x) if module.model.final_norm else x)

    return network.apply({"params": params}, stream, method=unembed)


# %% [markdown]
# For each layer, this shows the most likely next token after the text. It also shows how far the
# prediction is from that of the last layer: the Kullback-Leibler divergence in nats, mean over all
# places. With `config.model.backout` a part of the stream is taken off after the last layer, so the
# last row is then not what the model says.


# %%
def look(checkpoint: str, text: str) -> list[tuple[str, float]]:
    """(next token, divergence from the last layer) for each layer."""
    loaded = run.load_model(checkpoint, 0, print, devices=1)
    network = models.Transformer(loaded.config.model, loaded.config.compute)
    tokens = jnp.asarray([loaded.tokenizer.encode(text)])

    with jax.set_mesh(loaded.mesh):
        streams = jax.jit(residual_streams, static_argnums=0)(network, loaded.params, tokens)
        logits = [read_out(network, loaded.params, stream) for stream in streams]

    last = jax.nn.log_softmax(logits[-1])
    rows = []
    for number, layer in enumerate(logits, 1):
        own = jax.nn.log_softmax(layer)
        divergence = float((jnp.exp(last) * (last - own)).sum(-1).mean())
        best = loaded.tokenizer.decode([int(layer[0, -1].argmax())])
        rows.append((best, divergence))
        print(f"layer {number}: next {best!r}, {divergence:.3f} nats from the last layer")
    return rows


# %%
if __name__ == "__main__":
    flags = argparse.ArgumentParser(description="The logit lens of a checkpoint.")
    flags.add_argument("--checkpoint", required=True)
    flags.add_argument("--text", default="def read_")
    args = flags.parse_args()
    look(args.checkpoint, args.text)
