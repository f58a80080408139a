"""Mixtures of experts: Mixtral 8x7B from scratch, and a small one for a laptop.

    gpt-jax train --config=configs/moe.py:small --workdir=runs/moe
    gpt-jax train --config=configs/moe.py:8x7b --config.mesh.expert=8 --config.data.path='corpus/*.parquet' \\
        --workdir=runs/mixtral

    variant  layers x width  heads / kv  experts                    parameters      of a token   peak rate
    8x7b     32 x 4096       32 / 8      8 of 14,336, 2 a token     46,702,792,704  12.9 B       3e-4
    small    4 x 192         3 / 3       8 of 256, 2 a token, and   quickstart.py's model, every second feed-forward a
                                         1 for all                  mixture of the same width for each token

8x7b: architecture from Mistral's released `config.json` (arXiv 2401.04088): SwiGLU experts, RMSNorm
1e-5, no biases, untied head, vocabulary 32,000, rotary base 1e6, no windows, context 32,768; the
router's softmax is taken over the chosen two, which is the softmax over all, scaled to a sum of 1.
How it was trained is not released: rates, batch and horizon are those of `llama.py:8b`, the balance
loss 0.01 a layer is the Switch Transformer's (arXiv 2101.03961) and the router's z-loss 1e-3
ST-MoE's (arXiv 2202.08906). Rows are 8,192 tokens. 16 bytes a parameter make 747 GB of state: sized
for 64 devices of 80 GB or more, a row each; `--config.mesh.expert=8` splits the experts, and their
tokens travel; without it (fsdp alone) the experts' weights do.

small: nothing is dropped and no loss is added for balance: a bias on the choice keeps the experts
equally busy (DeepSeek-V3, arXiv 2412.19437; watch moe/load_max in the log, 1 is perfect). Muon
takes single matrices, so experts and routers go to AdamW. Seen with --config.train.steps=120 (2 CPU
cores, seed 0): held-out 2.065 bits a byte on 20 batches, moe/load_max from 2.7 at step 10 to 1.4;
with a balance_rate of 0.001 2.070 bits, and 3.6: nine tenths of all tokens went to one expert,
among others.
"""

from ml_collections import ConfigDict
from quickstart import adam, get_config as quickstart

ADAM_RATE = 0.004  # of experts and routers


def mixtral() -> ConfigDict:
    seq_len = 8192
    rows = 2**22 // seq_len
    return ConfigDict(
        dict(
            model=dict(
                layers=32,
                embed=4096,
                heads=32,
                kv_heads=8,
                mlp=14_336,
                vocab=32_000,
                max_seq=32_768,
                pattern=(("attention", "moe"),),
                experts=8,
                experts_per_token=2,
                expert_ffn="swiglu",
                router="softmax",
                router_normalize=True,
                balance="aux",
                balance_weight=0.01,
                router_z_loss=1e-3,
                norm="rmsnorm",
                norm_epsilon=1e-5,
                position="rotary",
                rope_base=1e6,
                tied=False,
                bias=False,
                init="gpt2",
            ),
            compute=dict(dtype="bfloat16", remat="block"),
            data=dict(
                tokenizer="bpe:32000",
                packing="best_fit",
                document_mask=True,
                split="document",
                eval_fraction=0.001,
            ),
            mesh=dict(data=1, fsdp=-1),
            optim=dict(
                optimizer="adamw",
                learning_rate=3e-4,
                b1=0.9,
                b2=0.95,
                eps=1e-5,
                weight_decay=0.1,
                clip=1.0,
                schedule="cosine",
                warmup_steps=2000,
                final_fraction=0.1,
            ),
            train=dict(steps=500_000, batch_size=rows, accumulate=8, seq_len=seq_len),
            eval=dict(every_steps=1000, batch_size=rows // 8, batches=16),
            checkpoint=dict(every_steps=1000, every_minutes=60.0),
        )
    )


def small() -> ConfigDict:
    config = quickstart()
    config.model.pattern = (("attention", "relu2"), ("attention", "moe"))
    config.model.update(
        dict(
            experts=8,
            experts_per_token=2,
            shared_experts=1,
            expert_mlp=256,
            expert_ffn="relu2",
            router="sigmoid",
            balance="bias",
            balance_rate=0.02,
        )
    )
    experts = adam("/mlp/(experts|router)/", ADAM_RATE, 0.9, 0.95)
    config.optim.groups = (experts, *config.optim.groups)
    return config


VARIANTS = {"8x7b": mixtral, "small": small}


def get_config(arg: str = "small") -> ConfigDict:
    if arg not in VARIANTS:
        raise ValueError(f"moe:{arg}: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[arg]()
