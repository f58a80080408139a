"""The recipe that the public speedruns agree on, with one dial: depth. Width, batch, steps, rates
and decay follow.

    gpt-jax train --config=configs/modern.py:d12 --config.data.path='corpus/*.parquet' --workdir=runs/d12

`modern:dN` has N layers; `modern:dN-windows` also limits three layers of four to a quarter of the
context. Windows are not the default because they only pay where the attention kernel skips what it
masks (splash on TPU does; a kernel that computes the full map and masks it is no faster and a
little worse).

Source: karpathy/nanochat, `nanochat/gpt.py`, `nanochat/optim.py`, `scripts/base_train.py` (2026),
which took most of it from KellerJordan/modded-nanogpt and tested each part at two depths or more.
Untied head, parameter-free RMSNorm (after the embedding too), ReLU^2, rotary base 100,000, QK-norm
after the rotation with both sides times 1.2, gated value embeddings on every second layer, learned
scalars on the residual stream and on the embedding at every layer, a gated share of the token
before (smear), a share of the middle of the stream taken off at its end (backout), logits capped at
15, projections that start at zero; matrices by Muon (row-normalised, decay cautious and falling to
zero, momentum up to 0.97 and down to 0.90), the rest by AdamW with a rate and betas of its own for
each kind; 40 steps of warmup, 65 % of linear decay to 5 %.

What the dial derives (computed below; vocabulary 32,768):

    depth  width  layer matrices + head  tokens    batch     steps
    d12      768   84.9 M + 25.2 M        1.32 B   524,288    2,520
    d20     1280  393.2 M + 41.9 M        5.22 B   1,048,576  4,980
    d26     1664  863.9 M + 54.5 M       11.02 B   1,048,576 10,510

Not here, though nanochat has them: row equilibration before and rescaling after orthogonalisation;
rows that always begin with a document; gates that start slightly above neutral.

Sized for 8 devices with 32 rows each, as nanochat; on one, --config.train.accumulate=8
--config.eval.batch_size=32 (d20 and up: 16 and 32). Value embeddings, residual scalars, smear and
backout can be switched off (as in --config.model.value_embed=false); their optimiser groups are
optional. For experiments on a CPU derive a small one:
    --config=configs/modern.py:d2 --config.compute.dtype=float32 --config.data.tokenizer=bpe:4096
    --config.model.vocab=4096 --config.train.seq_len=256 --config.train.batch_size=16
    --config.train.steps=500 --config.eval.batch_size=16
"""

from ml_collections import ConfigDict

VOCAB, SEQ_LEN, HEAD_DIM = 32_768, 2048, 128
GATE, SMEAR = 12, 24  # channels that drive the gates of value embeddings and of smear
OPTIONAL = ("/value_embed", "^residual", "^(smear|backout)")  # parts that can be switched off
TOKENS_PER_PARAMETER = 12  # of layer matrices and head (nanochat's fit)
REFERENCE_DEPTH, REFERENCE_BATCH = 12, 2**19  # where rates and decay were tuned; tokens
MATRIX_RATE = 0.02
EIGHT_DEVICES = 8 * 32  # rows of a microbatch


def make_width(depth: int) -> int:
    """64 a layer, rounded up to whole heads."""
    return -(-64 * depth // HEAD_DIM) * HEAD_DIM


def horizon(depth: int) -> int:
    """Tokens to train on."""
    width = make_width(depth)
    gates = (depth + 1) // 2 * GATE * (width // HEAD_DIM)
    return TOKENS_PER_PARAMETER * (12 * depth * width**2 + gates + VOCAB * width)


def batch_tokens(depth: int) -> int:
    """B ~ D^0.383 (Bergsma et al. 2025, arXiv 2505.13738), to the nearest power of two."""
    best = REFERENCE_BATCH * (horizon(depth) / horizon(REFERENCE_DEPTH)) ** 0.383
    return max(2**k for k in range(40) if 2 ** (k - 0.5) <= best)


def make_groups(width: int, weight_decay: float) -> tuple[dict, ...]:
    """The first that matches takes a parameter. Rates are absolute below and become factors of
    the matrices' rate."""
    narrow = (width / 768) ** -0.5  # Adam's rates were tuned at width 768

    def adam(match, rate, b1, b2, decay):
        return dict(
            match=match,
            optimizer="adamw",
            rate=rate / MATRIX_RATE,
            b1=b1,
            b2=b2,
            eps=1e-10,
            weight_decay=decay,
            optional=match.startswith(OPTIONAL),
        )

    return (
        adam("^head/", 0.008 * narrow, 0.8, 0.96, 0.01),
        adam("^embed/", 0.3 * narrow, 0.8, 0.995, 0.001),
        adam("/value_embed/", 0.15 * narrow, 0.8, 0.995, 0.01),
        adam("^residual/x0$", 0.5, 0.96, 0.95, 0.0),  # b1 of 0.98 falls off a cliff
        adam("^residual/x$", 0.005, 0.8, 0.95, 0.05),
        adam("^(smear|backout)/", 0.2, 0.8, 0.95, 0.0),
        dict(
            match="^(blocks|tail)/.*/kernel$",
            optimizer="muon",
            rate=1.0,
            b1=0.97,
            b2=0.9,
            weight_decay=weight_decay,
        ),
    )


def get_config(arg: str = "d12") -> ConfigDict:
    number, _, suffix = arg.removeprefix("d").partition("-")
    if not (
        arg.startswith("d")
        and number.isdecimal()
        and int(number)
        and arg in (f"d{number}", f"d{number}-windows")
    ):
        raise ValueError(
            f"modern:{arg}: expected dN or dN-windows with N layers, at least 1, such as d12"
        )
    depth = int(number)
    width, batch = make_width(depth), batch_tokens(depth)
    rows, scale = batch // SEQ_LEN, (batch / REFERENCE_BATCH) ** 0.5
    accumulate = max(1, rows // EIGHT_DEVICES)
    # Constant B / (rate * decay * D) (Wang & Aitchison 2024, arXiv 2405.13698), with the rate
    # growing as sqrt(B).
    weight_decay = 0.28 * scale * horizon(REFERENCE_DEPTH) / horizon(depth)
    return ConfigDict(
        dict(
            model=dict(
                layers=depth,
                embed=width,
                heads=width // HEAD_DIM,
                head_dim=HEAD_DIM,
                vocab=VOCAB,
                pattern=(("attention", "relu2"),),
                norm="plain_rmsnorm",
                norm_epsilon=1.2e-7,  # float32's own
                embed_norm=True,
                position="rotary",
                rope_base=100_000.0,
                qk_norm=True,
                qk_norm_after_rope=True,
                qk_scale=1.2,
                windows=(SEQ_LEN // 4,) * 3 + (0,) if suffix else (0,),
                last_window_full=True,
                logit_softcap=15.0,
                tied=False,
                bias=False,
                value_embed=True,
                value_embed_gate=GATE,
                residual_scalars=True,
                smear=True,
                smear_gate=SMEAR,
                backout=True,
                init="modern",
            ),
            # 32 rows of d16 keep some 50 GB for the backward pass; this is an estimate.
            compute=dict(dtype="bfloat16", remat="none" if depth <= 16 else "block"),
            data=dict(
                tokenizer=f"bpe:{VOCAB}", packing="chunk", split="document", eval_fraction=0.01
            ),
            mesh=dict(data=1, fsdp=-1),
            optim=dict(
                optimizer="adamw",
                learning_rate=MATRIX_RATE * scale,
                weight_decay=0.0,
                decay="all",
                clip=0.0,
                schedule="wsd",
                warmup_steps=40,
                decay_fraction=0.65,
                final_fraction=0.05,
                muon_momentum_warmup=400,
                muon_momentum_final=0.9,
                muon_cautious=True,
                muon_decay_to_zero=True,
                muon_normalize=True,
                groups=make_groups(width, weight_decay),
            ),
            train=dict(
                steps=horizon(depth) // batch,
                batch_size=rows,
                accumulate=accumulate,
                seq_len=SEQ_LEN,
                loss_chunk=128,
            ),  # 32 rows x 128: 0.5 GB of logits a device instead of 8.6
            eval=dict(
                every_steps=250, batch_size=rows // accumulate, batches=20, sample_every_steps=1000
            ),
            checkpoint=dict(every_steps=1000),
        )
    )
