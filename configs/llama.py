"""Llama 3 in three sizes, from scratch.

    gpt-jax train --config=configs/llama.py:8b --config.data.path='corpus/*.parquet' --workdir=runs/llama

    variant  model      layers x width  heads / kv  feed-forward  head    rope factor  parameters      peak rate
    1b       Llama 3.2  16 x 2048       32 / 8       8,192        tied    32            1,235,814,400  3e-4
    8b       Llama 3.1  32 x 4096       32 / 8      14,336        untied   8            8,030,261,248  3e-4
    70b      Llama 3.1  80 x 8192       64 / 8      28,672        untied   8           70,553,706,496  1.5e-4

Architecture: Meta's released `config.json` of each model: RMSNorm 1e-5, SwiGLU, no biases,
vocabulary 128,256, rotary base 500,000 with frequencies scaled for a context of 131,072 (original
8,192, low 1, high 4). Training: peak rates of 8b and 70b from the Llama 3 report (arXiv 2407.21783,
table 3; 1b takes that of 8b, since the released one was pruned and distilled); AdamW 0.9 / 0.95,
eps 1e-5, decay 0.1, clip 1.0, 2,000 steps of warmup, cosine to a tenth, 4 M tokens a step and 2 T
tokens in all from Llama 2 (arXiv 2307.09288, section 2.2).

The tokenizer: `bpe:128256` trains one of that size on your text; for Meta's give
--config.data.tokenizer=tokenizer.json

Parameters, optimiser and gradients are sharded over all devices (fsdp), 16 bytes a parameter in
all. 4 M tokens are 512 rows; a microbatch must divide over the devices, so choose
`--config.train.accumulate` with the machine in mind. Sized for 8 devices of 80 GB or more (1b: 4
rows each; 8b: 8 rows each), 70b for 256 (1 row each).
"""

from ml_collections import ConfigDict

SIZES = {
    "1b": dict(
        layers=16,
        embed=2048,
        heads=32,
        mlp=8192,
        tied=True,
        rope_scale_factor=32.0,
        learning_rate=3e-4,
        accumulate=16,
    ),
    "8b": dict(
        layers=32,
        embed=4096,
        heads=32,
        mlp=14_336,
        tied=False,
        rope_scale_factor=8.0,
        learning_rate=3e-4,
        accumulate=8,
    ),
    "70b": dict(
        layers=80,
        embed=8192,
        heads=64,
        mlp=28_672,
        tied=False,
        rope_scale_factor=8.0,
        learning_rate=1.5e-4,
        accumulate=2,
    ),
}


def get_config(arg: str = "8b") -> ConfigDict:
    if arg not in SIZES:
        raise ValueError(f"llama:{arg}: choose one of {', '.join(SIZES)}")
    size = SIZES[arg]
    seq_len = 8192
    rows = 2**22 // seq_len
    return ConfigDict(
        dict(
            model=dict(
                layers=size["layers"],
                embed=size["embed"],
                heads=size["heads"],
                kv_heads=8,
                mlp=size["mlp"],
                vocab=128_256,
                max_seq=131_072,
                pattern=(("attention", "swiglu"),),
                norm="rmsnorm",
                norm_epsilon=1e-5,
                position="rotary",
                rope_base=500_000.0,
                rope_scale_factor=size["rope_scale_factor"],
                rope_scale_low=1.0,
                rope_scale_high=4.0,
                rope_scale_original_seq=8192,
                tied=size["tied"],
                bias=False,
                init="gpt2",
            ),
            compute=dict(dtype="bfloat16", remat="block"),
            data=dict(
                tokenizer="bpe:128256",
                packing="best_fit",
                document_mask=True,
                split="document",
                eval_fraction=0.001,
            ),
            mesh=dict(data=1, fsdp=-1),
            optim=dict(
                optimizer="adamw",
                learning_rate=size["learning_rate"],
                b1=0.9,
                b2=0.95,
                eps=1e-5,
                weight_decay=0.1,
                clip=1.0,
                schedule="cosine",
                warmup_steps=2000,
                final_fraction=0.1,
            ),
            train=dict(
                steps=500_000,
                batch_size=rows,
                accumulate=size["accumulate"],
                seq_len=seq_len,
                loss_chunk=1024,
            ),  # 0.5 GB of logits a row instead of 4.2
            eval=dict(every_steps=1000, batch_size=rows // size["accumulate"], batches=16),
            checkpoint=dict(every_steps=1000, every_minutes=60.0),
        )
    )
