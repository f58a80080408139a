"""Whether the documents of a row stay apart in the whole model, and not in attention alone.

Any part that looks along a row could carry something over: attention, `smear`, a router with a
capacity, or a part that is yet to be written. So a run measures it, on a small twin of its model.
"""

from dataclasses import replace

import jax
import numpy as np

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.model.transformer import Transformer, abstract_params

LENGTH = 24
BORDER = 10  # the first token of the second document
LAYERS = 4
# Sound models are exact here, but for the order of sums in matmuls of experts.
LIMIT = 1e-3


def make_twin(model: config.Model) -> config.Model:
    """A small model with the same parts as `model`, which must be resolved."""
    embed = 32
    experts = min(model.experts, 4)
    return replace(
        model,
        layers=min(model.layers, max(LAYERS, len(model.pattern))),
        embed=embed,
        heads=2,
        kv_heads=1 if model.kv_heads < model.heads else 2,
        head_dim=16,
        mlp=32,
        expert_mlp=16,
        vocab=64,
        max_seq=LENGTH,
        experts=experts,
        experts_per_token=min(model.experts_per_token, experts),
        value_embed_gate=min(model.value_embed_gate, embed),
        smear_gate=min(model.smear_gate, embed),
        dropout=0.0,
        attention_dropout=0.0,
    )


def measure_leak(model: config.Model) -> float:
    """How much a document changes the logits of the one after it, relative to the largest logit.

    The twin runs in float32 with the reference kernel, on one device and without a mesh. The
    kernel of the run is measured by itself, see attention/conformance.py.
    """
    twin = make_twin(model)
    rng = np.random.default_rng(0)
    tokens = np.repeat(rng.integers(0, twin.vocab, (1, LENGTH)), 2, 0)
    tokens[1, :BORDER] = rng.integers(0, twin.vocab, BORDER)
    place = np.arange(LENGTH)
    is_second = place >= BORDER
    batch = {
        "tokens": tokens.astype(np.int32),
        "segment": np.repeat([1 + is_second], 2, 0).astype(np.int32),
        "position": np.repeat([place - BORDER * is_second], 2, 0).astype(np.int32),
    }

    def draw(like):
        # Some weights start at zero, and would hide what goes through them.
        return rng.normal(0.0, 0.3, like.shape).astype(like.dtype)

    def run(params, batch):
        return Transformer(twin).apply({"params": params}, batch)

    params = jax.tree.map(draw, abstract_params(twin))
    # Compiling is all of the cost, and a tiny program needs no optimiser.
    is_cpu = jax.default_backend() == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else None
    logits = np.asarray(jax.jit(run, compiler_options=options)(params, batch))
    difference = np.abs(logits[0, BORDER:] - logits[1, BORDER:]).max()
    return float(difference / np.abs(logits).max())


def check_leaks(model: config.Model) -> str:
    """A line for the start of a run whose documents are kept apart.

    Raises UsageError if a document of the twin changes the one after it.
    """
    leak = measure_leak(model)
    if not leak <= LIMIT:
        raise UsageError(
            "config.data.document_mask = True: a part of this model lets a document change the one "
            f"after it in a row (by {leak:.1e} of the logits in a small twin of the model); set it "
            "to false, or leave out the part"
        )
    return f"documents of a row: the whole model keeps them apart (a small twin of it: {leak:.1e})"
