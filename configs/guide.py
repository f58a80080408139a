"""A post-norm GPT after Vaswani et al. 2017, made causal.

    gpt-jax train --config=configs/guide.py --config.data.path='corpus/*.txt' --workdir=runs/guide

It has 8 layers normalised after the residual, width 512, 8 heads, feed-forward 2048 with ReLU,
dropout 0.1 on the embedding and on every branch, learned positions up to 1000, vocabulary 50,000,
LayerNorm epsilon 1e-6, Adam (3e-4, 0.9, 0.99) without decay, clipping or schedule, Glorot
initialisation, cross-entropy and accuracy as metrics.

A causal mask keeps each position from the token that it is to predict. Batch, length and steps are
chosen for one GPU.

76.9 M parameters: 25.6 M each for embedding and (untied) head, 25.2 M in the layers, 0.5 M
positions.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"guide has no variants, got {arg!r}")
    return ConfigDict(
        dict(
            model=dict(
                layers=8,
                embed=512,
                heads=8,
                mlp=2048,
                pattern=(("attention", "relu"),),
                vocab=50_000,
                max_seq=1000,
                norm="layernorm",
                norm_position="post",
                norm_epsilon=1e-6,
                final_norm=False,
                position="learned",
                tied=False,
                dropout=0.1,
                init="xavier",
            ),
            data=dict(tokenizer="bpe:50000"),
            optim=dict(
                optimizer="adamw",
                learning_rate=3e-4,
                b1=0.9,
                b2=0.99,
                weight_decay=0.0,
                clip=0.0,
                schedule="constant",
            ),
            train=dict(steps=20_000, batch_size=32, seq_len=500),  # at most max_seq
            eval=dict(every_steps=1000, sample_every_steps=1000),
        )
    )
