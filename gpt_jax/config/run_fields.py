"""The sections of a run: mesh, optimiser, training, evaluation, checkpoints and log."""

from dataclasses import dataclass

from gpt_jax.config.knobs import (
    DTYPES,
    LORA_VARIANTS,
    MEMORIES,
    MOST,
    MUON_SCALES,
    OBJECTIVES,
    OPTIMIZERS,
    SCHEDULES,
    knob,
)

# People write a huge number of steps for never. No device counts it.
NEVER = 10**15


@dataclass(frozen=True)
class Init:
    """What a new run starts from. A run that resumes has its own state."""

    from_: str = knob(
        "",
        "A checkpoint whose weights a new run starts from: a workdir or a folder of checkpoints, "
        "with @STEP for another step than the newest, or a directory of Hugging Face. Empty means "
        "random weights.",
    )
    model: str = knob(
        "config",
        "Where the model comes from: config.model, or the checkpoint. Of the latter, fields may be "
        "set that leave the meaning of the weights as it is, such as dropout.",
        choices=("config", "checkpoint"),
    )
    averaged: bool = knob(
        False, "Whether the checkpoint's averaged weights are taken in place of the last ones."
    )
    optimizer: bool = knob(
        False, "Whether the optimiser's moments are taken over. Its schedule begins anew."
    )


@dataclass(frozen=True)
class Lora:
    """Adapters of low rank beside weights that stay as they are (Hu et al. 2021)."""

    rank: int = knob(
        0,
        "The rank of the adapters. With one, config.init.from names the weights beneath them, and "
        "the adapters alone are learned and saved. 0 is off.",
        low=0,
    )
    alpha: float = knob(
        16.0,
        "What adapters add is multiplied by alpha / rank, or by alpha / sqrt(rank) of rslora.",
        low=0.0,
    )
    targets: tuple[str, ...] = knob(
        ("matrix",),
        "The weights that have adapters: roles of parameters, or regular expressions that are "
        "searched in paths such as blocks/0/attention/q/kernel.",
    )
    dropout: float = knob(
        0.0, "The part of its inputs that an adapter drops in training.", low=0.0, high=0.99
    )
    variant: str = knob(
        "lora",
        "What an adapter does: lora adds a product of two matrices; rslora scales it for large "
        "ranks; dora also learns the length of each column.",
        choices=LORA_VARIANTS,
    )


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis.

    A size counts devices inside a slice, which is an NVLink or ICI domain. A size `dcn_…` counts
    slices, over the network. One in-slice size may be -1 and takes what is left.
    """

    pipeline: int = knob(1, "Stages of layers.", low=-1)
    data: int = knob(-1, "Copies of everything.", low=-1)
    fsdp: int = knob(1, "Parts of parameters, gradients and optimiser state; see `zero`.", low=-1)
    expert: int = knob(
        1, "Parts of the experts of a mixture. Other weights are split as over fsdp.", low=-1
    )
    context: int = knob(
        1, "Parts of the sequence (ring attention). Weights are split as over fsdp.", low=-1
    )
    tensor: int = knob(1, "Parts of heads, feed-forward and vocabulary.", low=-1)
    dcn_pipeline: int = knob(1, "Slices along pipeline.", low=1)
    dcn_data: int = knob(1, "Slices along data.", low=1)
    dcn_fsdp: int = knob(1, "Slices along fsdp.", low=1)
    dcn_expert: int = knob(1, "Slices along expert.", low=1)
    dcn_context: int = knob(1, "Slices along context.", low=1)
    dcn_tensor: int = knob(1, "Slices along tensor.", low=1)
    zero: int = knob(
        3,
        "What fsdp splits. 3 splits parameters, gradients and optimiser state; 1 splits the last "
        "alone.",
        choices=(1, 3),
    )


@dataclass(frozen=True)
class Group:
    """Parameters with an optimiser of their own. The first group that matches a path takes it."""

    match: str = knob(
        ".*", "A regular expression that is searched in paths such as blocks/0/attention/q/kernel."
    )
    optimizer: str = knob("adamw", "The optimiser of the group.", choices=OPTIMIZERS)
    optional: bool = knob(
        False, "Whether the group may match nothing. A group that must match and does not raises."
    )
    rate: float = knob(1.0, "A factor on optim.learning_rate.", low=0.0)
    b1: float = knob(
        0.9,
        "The decay of the first moment; the momentum of sgd, muon and lion.",
        low=0.0,
        high=0.9999,
    )
    b2: float = knob(0.95, "The decay of the second moment.", low=0.0, high=0.99999)
    eps: float = knob(1e-8, "The number added to the root of the second moment.", low=0.0)
    weight_decay: float = knob(0.0, "Decoupled weight decay, times the rate.", low=0.0)


@dataclass(frozen=True)
class Optim:
    """The optimiser and the schedule."""

    optimizer: str = knob(
        "adamw", "The optimiser of every parameter that no group takes.", choices=OPTIMIZERS
    )
    learning_rate: float = knob(3e-4, "The peak learning rate.", low=0.0)
    b1: float = knob(
        0.9,
        "The decay of the first moment; the momentum of sgd, muon and lion.",
        low=0.0,
        high=0.9999,
    )
    b2: float = knob(0.95, "The decay of the second moment.", low=0.0, high=0.99999)
    eps: float = knob(1e-8, "The number added to the root of the second moment.", low=0.0)
    moment_dtype: str = knob(
        "float32",
        "The dtype of the first moment of adamw and lion. bfloat16 saves two bytes a parameter.",
        choices=DTYPES,
    )
    state_memory: str = knob(
        "device",
        "Where moments lie between updates: in the memory of the devices, or in that of their "
        "hosts, from which each update fetches them.",
        choices=MEMORIES,
    )
    weight_decay: float = knob(0.1, "Decoupled weight decay, times the rate.", low=0.0)
    decay: str = knob(
        "matrices",
        "What decays. `matrices` leaves out biases, norms and scalars.",
        choices=("matrices", "all"),
    )
    clip: float = knob(1.0, "The largest global norm of the gradient. 0 is off.", low=0.0)
    schedule: str = knob("cosine", "The course of the learning rate.", choices=SCHEDULES)
    warmup_steps: int = knob(0, "Steps over which the rate rises from 0 to its peak.", low=0)
    decay_steps: int = knob(0, "The step at which the schedule ends. 0 means train.steps.", low=0)
    decay_fraction: float = knob(
        0.2, "The part of the run over which wsd decays.", low=0.0, high=1.0
    )
    final_fraction: float = knob(
        0.1, "The last rate, as a part of the peak rate.", low=0.0, high=1.0
    )
    groups: tuple[Group, ...] = knob((), "Groups of parameters with optimisers of their own.")
    layer_decay: float = knob(
        1.0,
        "The rate of a layer as a part of that of the layer above it. The output has the full "
        "rate, and the embedding the smallest. 1 is off.",
        low=0.01,
        high=1.0,
    )
    muon_iterations: int = knob(5, "Newton-Schulz iterations of Muon.", low=1)
    muon_momentum_warmup: int = knob(
        0, "Steps over which Muon's momentum rises from 0.85 to b1. 0 is off.", low=0
    )
    muon_momentum_final: float = knob(
        0.0,
        "The momentum that Muon falls to while wsd decays. 0 is off.",
        low=0.0,
        high=0.9999,
    )
    muon_cautious: bool = knob(
        False, "Whether Muon decays only where update and weight agree in sign."
    )
    muon_decay_to_zero: bool = knob(
        False, "Whether Muon's weight decay falls to zero, as a cosine, at decay_steps."
    )
    muon_scale: str = knob(
        "shape",
        "What Muon multiplies its update by: max(1, out / in) ** 0.5 (shape), or "
        "0.2 * max(in, out) ** 0.5 (adam), which gives it the size of AdamW's (Moonlight).",
        choices=MUON_SCALES,
    )
    muon_normalize: bool = knob(
        False, "Whether Muon divides rows by their second moment (NorMuon), with b2."
    )


@dataclass(frozen=True)
class Train:
    """The loop."""

    steps: int = knob(1000, "The number of updates.", low=0)
    batch_size: int = knob(
        8,
        "Rows of an update, over all processes and microbatches. `length_ramp` cuts them.",
        low=1,
    )
    batch_ramp: tuple[tuple[int, int, int], ...] = knob(
        (),
        "Later batch sizes: (token, batch_size, accumulate). A size counts from the first update "
        "at or after its token. The learning-rate schedule goes by steps all the same.",
    )
    seq_len: int = knob(256, "Tokens of a row.", low=2, high=2**30)
    length_ramp: tuple[tuple[int, int], ...] = knob(
        (),
        "Shorter rows: (token, length). From the first update at or after its token on, rows of "
        "seq_len tokens are cut into rows of this length. It must divide seq_len, and the entry "
        "with seq_len itself ends the cutting. An update keeps its examples and its tokens.",
    )
    accumulate: int = knob(1, "Microbatches of an update.", low=1)
    reduce_once: bool = knob(
        False,
        "Whether devices sum their gradients once an update, and not at every microbatch. Each "
        "must have all weights whole, or cut over the mesh axis tensor alone.",
    )
    objective: str = knob("next_token", "What is minimised.", choices=OBJECTIVES)
    z_loss: float = knob(0.0, "The weight of log(Z)^2 in the loss.", low=0.0)
    label_smoothing: float = knob(
        0.0, "The part of the target that is spread over the vocabulary.", low=0.0, high=0.99
    )
    loss_chunk: int = knob(
        0,
        "Tokens of a row whose logits exist at a time. Their gradient is made with them, so that "
        "none are made twice. 0 means all of them. It is cut where `length_ramp` cuts rows.",
        low=0,
    )
    freeze: tuple[str, ...] = knob(
        (),
        "What stays as it is: roles of parameters, such as embedding, or regular expressions that "
        "are searched in paths such as blocks/0/attention/q/kernel.",
    )
    ema: float = knob(0.0, "The decay of averaged weights. 0 is off.", low=0.0, high=0.999999)
    ema_warmup: bool = knob(
        False, "Whether that decay begins as (1 + step) / (10 + step), while this is smaller."
    )
    hang_minutes: float = knob(
        30.0, "The run ends with exit code 41 when no step ends for so long. 0 is off.", low=0.0
    )


@dataclass(frozen=True)
class Eval:
    """Evaluation and samples during training."""

    every_steps: int = knob(
        250, "Updates between evaluations. 0 means at the end alone.", low=0, high=NEVER
    )
    evaluators: tuple[str, ...] = knob(
        ("heldout",),
        "What an evaluation measures, in this order: heldout (loss by source), samples (a text), "
        "xz (what xz -9 makes of the held-out text), questions (the answers to eval.questions). "
        "classification tells the labels of held-out rows of prepare --task=classify.",
    )
    questions: tuple[str, ...] = knob(
        (),
        "Local files of questions for the evaluator questions, or folders of them. A row has "
        "context, choices and gold, or context and answer; docs/evaluation.md lists other forms.",
    )
    sets: tuple[tuple[str, str], ...] = knob(
        (),
        "Further held-out texts, (name, path) for each, that evaluations measure by themselves. "
        "Their metrics are eval/<name>/<metric>, and no part of eval/loss.",
    )
    batches: int = knob(
        0, "Held-out batches of an evaluation. 0 means all of them.", low=0, high=NEVER
    )
    stride: int = knob(
        0,
        "Tokens by which rows of held-out text move on. Each token is predicted once, and sees at "
        "least train.seq_len - stride tokens before it, or all that its text has. 0 means "
        "train.seq_len: rows that have no token in common.",
        low=0,
        high=2**30,
    )
    batch_size: int = knob(0, "Rows of a held-out batch. 0 means train.batch_size.", low=0)
    sample_every_steps: int = knob(
        0, "Updates between samples. 0 means at the end alone.", low=0, high=NEVER
    )
    samples: int = knob(
        3, "Samples at the end of a run, prompts in turn. 0 means none, also during it.", low=0
    )
    sample_prompts: tuple[str, ...] = knob(
        (),
        "Prompts of the samples. A plain text is one prompt, commas included; several are written "
        "('a', 'b'). Without any it is a newline, or the first character that the tokenizer knows.",
        entries="prose",
    )
    sample_tokens: int = knob(100, "New tokens of a sample.", low=1)
    sample_temperature: float = knob(0.8, "The temperature of a sample. 0 is greedy.", low=0.0)
    sample_top_k: int = knob(
        0,
        "The most likely tokens that a sample draws from. 0 means all.",
        low=0,
        high=MOST,
    )
    compare_xz: bool = knob(
        False, "Whether the end of the run also tells what xz -9 makes of the held-out text."
    )


@dataclass(frozen=True)
class Checkpoint:
    """When checkpoints are saved, and which of them are kept."""

    every_steps: int = knob(
        1000,
        "Updates between checkpoints. 0 means at the end and on request alone.",
        low=0,
        high=NEVER,
    )
    every_minutes: float = knob(0.0, "Minutes between checkpoints. 0 is off.", low=0.0)
    keep_last: int = knob(2, "The number of newest checkpoints that are kept.", low=1, high=NEVER)
    keep_every_steps: int = knob(
        0, "Checkpoints at multiples of this are kept for ever. 0 is off.", low=0, high=NEVER
    )
    keep_best: int = knob(
        0,
        "The number of best checkpoints that are kept, by `best_metric`. An evaluation that is "
        "among the best saves one. 0 is off.",
        low=0,
        high=NEVER,
    )
    best_metric: str = knob(
        "eval/loss",
        "The metric that says which checkpoint is best; lower is better.",
        choices=("eval/loss", "eval/bits_per_byte", "eval/perplexity"),
    )
    export: str = knob(
        "none",
        "In which form the last checkpoint is also written, into the workdir: as a directory of "
        "Hugging Face (hf), or in no other.",
        choices=("none", "hf"),
    )
    export_every_steps: int = knob(
        0,
        "Saved checkpoints at multiples of this are written in the form of `export` too, and kept "
        "for ever. It goes on beside the training. 0 means the last one alone.",
        low=0,
        high=NEVER,
    )
    mirror: str = knob(
        "~/.cache/gpt_jax/mirror",
        "The folder for copies of what lies at URLs: the workdir that a run works in, which all "
        "processes of a job have to share, and checkpoints that are read.",
    )


@dataclass(frozen=True)
class Log:
    """What is reported."""

    every_steps: int = knob(10, "Updates between lines of metrics.", low=1, high=NEVER)
    tensorboard: bool = knob(True, "Whether TensorBoard files are written.")
    progress: bool = knob(True, "Whether a terminal shows a progress bar.")
