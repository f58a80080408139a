"""Writes the model of configs/guide.py with Keras 3, small, and the logits that Keras has for it.

    KERAS_BACKEND=jax python tests/support/make_keras_guide.py FOLDER

Keras is no part of any extra. `tests/interop/test_keras.py` reads the two files if GUIDE_KERAS
names the folder.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers

EMBED, HEADS, MLP, LAYERS, VOCAB, SEQ = 32, 4, 64, 3, 50, 16


class Embedding(layers.Layer):
    """Tokens and learned positions."""

    def __init__(self, **options):
        super().__init__(**options)
        self.token_emb = layers.Embedding(VOCAB, EMBED)
        self.pos_emb = layers.Embedding(SEQ, EMBED)

    def call(self, ids):
        return self.token_emb(ids) + self.pos_emb(keras.ops.arange(SEQ))


class Block(layers.Layer):
    """Attention and a feed-forward, each normalised after its residual."""

    def __init__(self, **options):
        super().__init__(**options)
        self.att = layers.MultiHeadAttention(HEADS, EMBED // HEADS)
        self.ffn = keras.Sequential([layers.Dense(MLP, activation="relu"), layers.Dense(EMBED)])
        self.norm1 = layers.LayerNormalization(epsilon=1e-6)
        self.norm2 = layers.LayerNormalization(epsilon=1e-6)

    def call(self, x):
        x = self.norm1(x + self.att(x, x, use_causal_mask=True))
        return self.norm2(x + self.ffn(x))


def make_model() -> keras.Model:
    """The model, all of its weights drawn, biases and scales too."""
    ids = keras.Input((SEQ,), dtype="int32")
    x = Embedding()(ids)
    for _ in range(LAYERS):
        x = Block()(x)
    model = keras.Model(ids, layers.Dense(VOCAB, use_bias=False)(x))
    rng = np.random.default_rng(0)
    model.set_weights([rng.normal(size=w.shape) * 0.3 for w in model.weights])
    return model


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model = make_model()
    tokens = np.random.default_rng(1).integers(0, VOCAB, SEQ)
    model.save_weights(folder / "guide.weights.h5")
    np.savez(folder / "guide.npz", ids=tokens, logits=np.asarray(model(tokens[None])[0]))
