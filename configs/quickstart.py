"""A small GPT on text that every machine has: the source of Python's standard library. Minutes on
two CPU cores.

    ./launch/local.sh train --config=configs/quickstart.py --workdir=runs/quickstart

The recipe of `modern.py` at 4 x 192 on a byte-level BPE of 4,096 tokens: parameter-free RMSNorm,
rotary positions, QK-norm, ReLU^2, value embeddings, residual scalars, Muon for matrices and AdamW
for the rest. Files are split whole, one in twenty held out, so that no held-out function has a
neighbour in training.

The size is meant for about three minutes of training on 2 CPU cores: a step of 2,048 tokens is 36
GFLOP (2.6 M matmul weights times 6 and 2.4 M of attention map, per token) and some 10 more for
Muon. With more patience --config.train.steps=2000. Rates are `modern.py`'s, those of AdamW times
(192 / 768)^-0.5 = 2.
"""

from ml_collections import ConfigDict

MATRIX_RATE = 0.02


def adam(match: str, rate: float, b1: float, b2: float) -> dict:
    return dict(
        match=match,
        optimizer="adamw",
        rate=rate / MATRIX_RATE,
        b1=b1,
        b2=b2,
        eps=1e-10,
        optional=match.startswith(("/value_embed", "^residual")),
    )


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"quickstart has no variants, got {arg!r}")
    width = 192
    narrow = (width / 768) ** -0.5  # AdamW's rates were tuned at width 768
    groups = (
        adam("^head/", 0.008 * narrow, 0.8, 0.96),
        adam("^embed/", 0.3 * narrow, 0.8, 0.995),
        adam("/value_embed/", 0.15 * narrow, 0.8, 0.995),
        adam("^residual/x0$", 0.5, 0.96, 0.95),
        adam("^residual/x$", 0.005, 0.8, 0.95),
        dict(
            match="^(blocks|tail)/.*/kernel$", optimizer="muon", b1=0.95, b2=0.9, weight_decay=0.1
        ),
    )
    return ConfigDict(
        dict(
            model=dict(
                layers=4,
                embed=width,
                heads=width // 64,
                vocab_multiple=64,
                pattern=(("attention", "relu2"),),
                norm="plain_rmsnorm",
                norm_epsilon=1.2e-7,
                embed_norm=True,
                position="rotary",
                qk_norm=True,
                qk_norm_after_rope=True,
                qk_scale=1.2,
                logit_softcap=15.0,
                tied=False,
                bias=False,
                value_embed=True,
                residual_scalars=True,
                init="modern",
            ),
            compute=dict(unroll=0),  # few layers: unrolled, as in shakespeare_char.py
            data=dict(
                path=("stdlib",),
                tokenizer="bpe:4096",
                packing="chunk",
                split="document",
                eval_fraction=0.05,
            ),
            optim=dict(
                optimizer="adamw",
                learning_rate=MATRIX_RATE,
                weight_decay=0.0,
                decay="all",
                clip=0.0,
                schedule="wsd",
                warmup_steps=20,
                decay_fraction=0.65,
                final_fraction=0.05,
                muon_momentum_warmup=100,
                muon_cautious=True,
                muon_decay_to_zero=True,
                muon_normalize=True,
                groups=groups,
            ),
            train=dict(steps=400, batch_size=8, seq_len=256),
            eval=dict(
                every_steps=200,
                compare_xz=True,
                sample_every_steps=150,
                sample_tokens=100,
                sample_prompts=("def ", "class ", "import "),
            ),
            checkpoint=dict(every_steps=200),
        )
    )
