"""GPT-2 in OpenAI's four sizes, trained as nanoGPT trains the smallest.

    gpt-jax train --config=configs/gpt2.py:124m --config.data.path='openwebtext/*.parquet' --workdir=runs/gpt2

    variant  layers x width  heads  parameters     peak rate
    124m     12 x 768        12       124,439,808  6e-4
    350m     24 x 1024       16       354,823,168  3e-4
    774m     36 x 1280       20       774,030,080  2.5e-4
    1558m    48 x 1600       25     1,557,611,200  2e-4

Architecture: Radford et al. 2019 and OpenAI's released weights (pre-norm, biases everywhere, tanh
GELU, learned positions up to 1024, vocabulary 50,257, tied head). Training: nanoGPT
`config/train_gpt2.py` (600,000 steps of 491,520 tokens, AdamW 0.9 / 0.95, decay 0.1, clip 1.0,
2,000 steps of warmup, cosine to a tenth, bfloat16, no dropout); the peak rates of the larger sizes
are those of the GPT-3 models nearest to them (Brown et al. 2020, table 2.1).

Expected for 124m: held-out loss about 2.85 on OpenWebText at the end (nanoGPT's README; OpenAI's
own weights have 3.12 there). A short run to compare: llm.c reaches 3.272 on FineWeb in 19,560 steps
of 524,288 tokens (decay to 0).

The tokenizer: `bpe:50257` trains GPT-2's kind of vocabulary (50,000 merges, 256 bytes, end of text)
on your text. For OpenAI's own merges, and to compare losses with anyone, give their file:
--config.data.tokenizer=path/to/tokenizer.json

Sized for 8 devices with 12 rows each and 5 microbatches, as nanoGPT. On one:
--config.train.accumulate=40 --config.eval.batch_size=12. For `--config.mesh.tensor` above 1 the
vocabulary must divide: --config.model.vocab=50304, which is faster on any device and what nanoGPT
trains (it also drops the biases: --config.model.bias=false). One text file alone is one document:
then --config.data.split=tail.
"""

from ml_collections import ConfigDict

SIZES = {
    "124m": dict(layers=12, embed=768, heads=12, learning_rate=6e-4, remat="none"),
    "350m": dict(layers=24, embed=1024, heads=16, learning_rate=3e-4, remat="block"),
    "774m": dict(layers=36, embed=1280, heads=20, learning_rate=2.5e-4, remat="block"),
    "1558m": dict(layers=48, embed=1600, heads=25, learning_rate=2e-4, remat="block"),
}


def get_config(arg: str = "124m") -> ConfigDict:
    if arg not in SIZES:
        raise ValueError(f"gpt2:{arg}: choose one of {', '.join(SIZES)}")
    size = SIZES[arg]
    rows, accumulate = (
        480,
        5,
    )  # nanoGPT: 12 rows x 40 microbatches over 8 GPUs x 1024 = 491,520 tokens
    return ConfigDict(
        dict(
            model=dict(
                layers=size["layers"],
                embed=size["embed"],
                heads=size["heads"],
                vocab=50_257,
                max_seq=1024,
                pattern=(("attention", "gelu_tanh"),),
                norm="layernorm",
                norm_epsilon=1e-5,
                position="learned",
                bias=True,
                tied=True,
                init="gpt2",
            ),
            compute=dict(dtype="bfloat16", remat=size["remat"]),
            data=dict(
                tokenizer="bpe:50257", packing="window", split="document", eval_fraction=0.0005
            ),
            mesh=dict(data=1, fsdp=-1),
            optim=dict(
                optimizer="adamw",
                learning_rate=size["learning_rate"],
                b1=0.9,
                b2=0.95,
                weight_decay=0.1,
                clip=1.0,
                schedule="cosine",
                warmup_steps=2000,
                final_fraction=0.1,
            ),
            train=dict(
                steps=600_000, batch_size=rows, accumulate=accumulate, seq_len=1024, loss_chunk=256
            ),  # 12 rows x 256: 0.6 GB of logits a device instead of 2.5
            eval=dict(
                every_steps=1000, batch_size=rows // accumulate, batches=25, sample_every_steps=5000
            ),
            checkpoint=dict(every_steps=1000, keep_best=1),
        )
    )
