"""A tiny config that keeps every feature of a large one.

The rule is RULE, which every card prints. What it does not name stays as the row has it.
"""

from dataclasses import replace

from gpt_jax import config as configs

STEPS = 8
ROWS = 16
LENGTH = 32
CHUNK = 8  # Tokens whose logits exist at a time, where the row has such chunks.
HEAD_DIM = 8
STEP_OF_WIDTHS = 8  # Every width divides over meshes of eight devices.
KV_HEADS = 4  # Of multi-head attention, and half as many of grouped-query attention.
PERIODS = 2
EXPERTS = 8
WARMUP_STEPS = 2
MICROBATCHES = 2

RULE = (
    f"The model has at most {PERIODS} periods of the layer pattern, and the layers after them.",
    f"Heads have {HEAD_DIM} channels, and their ratio to kv heads is the row's.",
    "Widths and windows keep the row's ratios.",
    f"There are at most {EXPERTS} experts.",
    "Tokens are bytes.",
    f"A step has {ROWS} rows of {LENGTH} tokens, in at most {MICROBATCHES} microbatches.",
    f"The run has {STEPS} steps, {WARMUP_STEPS} of them with warmup if the row has any.",
    "Matmuls run in float32, so that a difference is an error and not rounding.",
    "Everything else is the row's.",
)


def shrink(row: configs.Config) -> configs.Config:
    """The tiny config of a resolved row by RULE. Its text and its cache are still to be named."""
    return replace(
        row,
        init=configs.Init(),
        model=shrink_model(row.model, row.train.seq_len),
        compute=shrink_compute(row.compute),
        data=shrink_data(row, STEPS * ROWS * LENGTH),
        mesh=configs.Mesh(data=1, zero=row.mesh.zero),
        optim=shrink_optim(row.optim),
        train=shrink_train(row.train, LENGTH),
        eval=configs.Eval(every_steps=0, batch_size=ROWS, batches=2, samples=0),
        checkpoint=configs.Checkpoint(every_steps=STEPS // 2, keep_last=2),
        log=configs.Log(every_steps=1, tensorboard=False, progress=False),
    )


def keep_model(row: configs.Config, source: str) -> configs.Config:
    """The config of `shrink` with the row's own model, and the weights at `source`."""
    small = shrink(row)
    return replace(
        small,
        init=configs.Init(from_=source),
        model=row.model,
        data=replace(small.data, tokenizer=""),
        train=shrink_train(row.train, min(LENGTH, row.model.max_seq)),
    )


def shrink_width(width: int, old: int, new: int) -> int:
    """A width in the ratio `new` / `old`, at a multiple of STEP_OF_WIDTHS."""
    return STEP_OF_WIDTHS * max(1, round(width * new / old / STEP_OF_WIDTHS))


def shrink_model(model: configs.Model, seq_len: int) -> configs.Model:
    """The tiny model of a resolved one whose rows have `seq_len` tokens."""
    plan = configs.layout(configs.layer_specs(model))
    ratio = model.heads // model.kv_heads
    kv_heads = min(model.kv_heads, KV_HEADS if ratio == 1 else KV_HEADS // 2)
    heads = ratio * kv_heads
    embed = shrink_width(model.embed, model.heads * model.head_dim, heads * HEAD_DIM)
    experts = min(model.experts, EXPERTS)
    is_longer = model.max_seq > seq_len

    return replace(
        model,
        layers=len(plan.period) * min(plan.repeats, PERIODS) + len(plan.tail),
        embed=embed,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=HEAD_DIM,
        mlp=shrink_width(model.mlp, model.embed, embed),
        vocab=0,
        vocab_multiple=STEP_OF_WIDTHS,
        max_seq=2 * LENGTH if is_longer else LENGTH,
        rope_scale_original_seq=max(1, model.rope_scale_original_seq * LENGTH // seq_len),
        windows=tuple(shrink_window(window, seq_len) for window in model.windows),
        value_embed_gate=min(model.value_embed_gate, embed),
        smear_gate=min(model.smear_gate, embed),
        experts=experts,
        experts_per_token=min(model.experts_per_token, experts),
        expert_mlp=shrink_width(model.expert_mlp, model.embed, embed),
    )


def shrink_window(window: int, seq_len: int) -> int:
    """A window in the ratio of the rows, of two keys or more. 0 still means all keys."""
    return max(2, window * LENGTH // seq_len) if window else 0


def shrink_compute(compute: configs.Compute) -> configs.Compute:
    """The row's remat and scan, and what this machine can run of the rest."""
    return replace(
        compute,
        dtype="float32",
        matmul_dtype="compute",
        kernel="auto",
        expert_matmul="auto",
        compiler_options=(),
        pipeline_rounds=1,
        pipeline_microbatches=0,
    )


def shrink_data(row: configs.Config, tokens: int) -> configs.Data:
    """How the row packs and mixes, on a run of so many tokens."""
    data = row.data
    planned = max(1, row.train.steps * row.train.batch_size * row.train.seq_len)
    return replace(
        configs.Data(),
        sources=data.sources,
        weights=data.weights,
        temperature=data.temperature,
        phases=tuple((begin * tokens // planned, weights) for begin, weights in data.phases),
        block=data.block,
        eval_fraction=0.25,
        split=data.split,
        tokenizer="bytes+fim" if data.fim else "bytes",
        packing=data.packing,
        document_mask=data.document_mask,
        shuffle_documents=data.shuffle_documents,
        fim=data.fim,
        fim_spm=data.fim_spm,
        workers=1,
    )


def shrink_optim(optim: configs.Optim) -> configs.Optim:
    """The row's optimisers and rates, with a schedule of STEPS."""
    return replace(
        optim,
        warmup_steps=min(optim.warmup_steps, WARMUP_STEPS),
        decay_steps=0,
        muon_momentum_warmup=min(optim.muon_momentum_warmup, WARMUP_STEPS),
        state_memory="device",
    )


def shrink_train(train: configs.Train, length: int) -> configs.Train:
    """A few steps with the row's objective."""
    return replace(
        train,
        steps=STEPS,
        batch_size=ROWS,
        batch_ramp=(),
        seq_len=length,
        length_ramp=(),
        accumulate=min(train.accumulate, MICROBATCHES),
        loss_chunk=CHUNK if train.loss_chunk else 0,
        hang_minutes=0.0,
    )
