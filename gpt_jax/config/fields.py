"""Every knob of a run, its default and its limits, as frozen dataclasses: one section for each room.

A knob whose value 0 means "derived" says so in its comment; `checks.resolve` fills it in.
"""

from dataclasses import dataclass, field


def knob(default, *, low=None, high=None, choices=None):
    """A dataclass field with limits: `low <= value <= high`, or one of `choices`."""
    return field(default=default, metadata={"low": low, "high": high, "choices": choices})


NORMS = ("layernorm", "rmsnorm", "plain_rmsnorm")
POSITIONS = ("learned", "rotary", "sinusoidal", "none")
MIXERS = ("attention",)
DENSE_FFNS = ("relu", "gelu", "gelu_tanh", "relu2", "swiglu", "geglu")
FFNS = (*DENSE_FFNS, "moe")
ROUTERS = ("softmax", "sigmoid")
BALANCES = ("none", "aux", "bias")
DISPATCHES = ("dropless", "capacity")
KERNELS = ("auto", "reference", "blocked", "ring", "xla", "cudnn", "splash")
REMATS = ("none", "block", "dots", "offload")
INITS = ("gpt2", "xavier", "modern")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd", "muon")
SCHEDULES = ("constant", "cosine", "linear", "wsd", "inverse_sqrt")
ENDLESS = ("constant", "inverse_sqrt")  # schedules without a last step
PACKINGS = ("window", "chunk", "document", "first_fit", "best_fit")
WEIGHTS = ("tokens", "documents")
SPLITS = ("tail", "document")
OBJECTIVES = ("next_token",)
DTYPES = ("float32", "bfloat16")  # float16 would need loss scaling


@dataclass(frozen=True)
class Model:
    """The transformer, as data (read by gpt_jax/model)."""

    layers: int = knob(4, low=1)
    embed: int = knob(128, low=1)  # width of the residual stream
    heads: int = knob(4, low=1)  # query heads
    kv_heads: int = knob(0, low=0)  # key and value heads; 0: same as heads (1: multi-query)
    head_dim: int = knob(0, low=0)  # 0: embed / heads
    mlp: int = knob(0, low=0)  # hidden width of the feed-forward; 0: 4 * embed
    vocab: int = knob(
        0, low=0
    )  # rows of the embedding; 0: the tokenizer's size rounded up to vocab_multiple
    vocab_multiple: int = knob(1, low=1)  # 64 or 128 keeps the head's matmul aligned
    max_seq: int = knob(
        0, low=0, high=2**30
    )  # longest context (learned positions, KV cache); 0: train.seq_len
    pattern: tuple[tuple[str, str], ...] = (
        ("attention", "gelu_tanh"),
    )  # (mixer, feed-forward), tiled over depth
    norm: str = knob("layernorm", choices=NORMS)
    norm_epsilon: float = knob(1e-5, low=0.0)
    norm_position: str = knob("pre", choices=("pre", "post"))
    embed_norm: bool = False  # normalise right after the embedding
    final_norm: bool = True  # normalise before the head
    position: str = knob("learned", choices=POSITIONS)
    rope_base: float = knob(10_000.0, low=1.0)
    rope_fraction: float = knob(1.0, low=0.0, high=1.0)  # part of head_dim that rotates
    rope_scale_factor: float = knob(1.0, low=1.0)  # Llama-3 frequency scaling; 1: off
    rope_scale_low: float = knob(
        1.0, low=0.0
    )  # wavelengths above original_seq / low are divided by the factor
    rope_scale_high: float = knob(4.0, low=0.0)  # wavelengths below original_seq / high stay
    rope_scale_original_seq: int = knob(8192, low=1)
    windows: tuple[int, ...] = (
        0,
    )  # keys a query may look at, itself included, tiled over depth; 0: all
    last_window_full: bool = False  # the last layer always sees everything
    qk_norm: bool = False
    qk_norm_after_rope: bool = (
        False  # normalise after rotating (nanochat) instead of before (Qwen3)
    )
    qk_scale: float = knob(1.0, low=0.0)  # extra factor on both q and k after their norm
    attention_softcap: float = knob(0.0, low=0.0)  # c * tanh(score / c); 0: off
    logit_softcap: float = knob(0.0, low=0.0)  # the same on the logits
    tied: bool = True  # the head is the embedding, transposed
    bias: bool = True  # biases on matmuls and LayerNorms
    qkv_bias: bool = True  # biases on q, k, v; needs bias (Qwen2: bias only here is a later row)
    dropout: float = knob(0.0, low=0.0, high=0.99)  # on the embedding and on every residual branch
    attention_dropout: float = knob(
        0.0, low=0.0, high=0.99
    )  # on attention probabilities (reference and blocked kernels)
    value_embed: bool = False  # gated value embeddings on alternate layers, the last included
    value_embed_gate: int = knob(12, low=1)  # channels of the residual stream that drive the gate
    residual_scalars: bool = False  # x = r_i * x + a_i * x0, both learned
    smear: bool = False  # each token gets a gated share of the one before it
    smear_gate: int = knob(24, low=1)  # channels of the embedding that drive the gate
    backout: bool = False  # a learned share of the stream halfway up is taken off at the end
    experts: int = knob(8, low=1)  # of a feed-forward "moe" in the pattern
    experts_per_token: int = knob(2, low=1)  # that each token is sent to, the highest scores first
    expert_mlp: int = knob(0, low=0)  # hidden width of one expert; 0: mlp
    expert_ffn: str = knob("swiglu", choices=DENSE_FFNS)  # what an expert is
    shared_experts: int = knob(0, low=0)  # experts that every token goes through, besides
    router: str = knob("softmax", choices=ROUTERS)  # scores of the experts
    router_normalize: bool = True  # the chosen experts' scores are scaled to a sum of 1
    router_z_loss: float = knob(0.0, low=0.0)  # weight of the router's log(Z)^2
    balance: str = knob(
        "aux", choices=BALANCES
    )  # how experts get equal shares: a loss, or a bias on the choice
    balance_weight: float = knob(0.01, low=0.0)  # of the loss (aux)
    balance_rate: float = knob(0.001, low=0.0)  # step of the bias (bias)
    dispatch: str = knob(
        "dropless", choices=DISPATCHES
    )  # capacity: what exceeds an expert's share of a row is left out
    capacity_factor: float = knob(1.25, low=0.0)  # that share, in parts of an equal one
    init: str = knob("gpt2", choices=INITS)


@dataclass(frozen=True)
class Compute:
    """How the model runs. Nothing here changes what the weights mean."""

    dtype: str = knob("float32", choices=DTYPES)  # of matmuls; parameters and sums stay float32
    kernel: str = knob("auto", choices=KERNELS)  # attention kernel; a named one runs or raises
    remat: str = knob("none", choices=REMATS)  # what the backward pass recomputes
    unroll: int = knob(
        1, low=0
    )  # layer periods per scan iteration; 0: all (same parameters, longer compile)
    shard_sequence: bool = (
        False  # between matmuls the stream's sequence is split over the axis tensor too
    )
    pipeline_rounds: int = knob(
        1, low=1
    )  # times that a microbatch goes round the stages; more rounds, smaller bubble
    pipeline_microbatches: int = knob(
        0, low=0
    )  # of a (micro)batch in the pipeline; 0: as many as stages
    compiler_options: tuple[str, ...] = ()  # NAME=VALUE, on top of gpt_jax/hardware/xla_options.py

    @property
    def stream(self) -> str:
        """The logical axis of the stream's sequence between matmuls."""
        return "stream" if self.shard_sequence else "seq"


@dataclass(frozen=True)
class Data:
    """Where text comes from and how it becomes rows (read by gpt_jax/data)."""

    path: tuple[
        str, ...
    ] = ()  # files, directories, globs, a folder made by `gpt-jax prepare`, or the word stdlib (the
    #                             Python standard library's source)
    sources: tuple[
        tuple[str, str, float], ...
    ] = ()  # in place of path, a mixture: (name, path, weight), …
    weights: str = knob("tokens", choices=WEIGHTS)  # what the weights of sources are parts of
    temperature: float = knob(
        0.0, low=0.0
    )  # t > 0: weights are multiplied by size ** (1 / t), in the unit of weights
    phases: tuple[
        tuple[int, tuple[float, ...]], ...
    ] = ()  # (from token, a weight for each source), …; begins with
    #                                         the first row at or after that token, blocks are counted from there
    block: int = knob(
        1000, low=1
    )  # examples that hold each source's share exactly; shorter only just before a stage
    eval_path: tuple[str, ...] = ()  # held-out text; empty: split off `path`
    eval_fraction: float = knob(
        0.1, low=0.0, high=0.9
    )  # of text files; `gpt-jax prepare` has decided for its folders
    split: str = knob(
        "tail", choices=SPLITS
    )  # tail: the last part by position; document: by hash of the document
    field: str = "text"  # the text's field in .jsonl, .json, .csv, .tsv, .parquet, .arrow
    errors: str = knob("strict", choices=("strict", "replace"))  # undecodable bytes
    encodings: tuple[str, ...] = ("utf-8",)  # tried in turn on each document
    documents: str = knob("file", choices=("file", "line"))  # what a document of a text file is
    tokenizer: str = ""  # bytes | char | bpe:VOCAB | a path, see the README; empty: that of a prepared folder, else bytes
    packing: str = knob(
        "window", choices=PACKINGS
    )  # window: random windows; chunk: each token once an epoch; document: rows
    #                                           begin with a document; first_fit, best_fit: whole documents, packed
    document_mask: bool = False  # documents of a row do not see and do not predict each other (segments, own positions)
    shuffle_documents: bool = False  # another order of the documents inside each row
    fim: float = knob(
        0.0, low=0.0, high=1.0
    )  # part of the documents rearranged to fill in the middle
    fim_spm: float = knob(0.5, low=0.0, high=1.0)  # of those, the part with the suffix first
    cache: str = "~/.cache/gpt_jax"  # token files, keyed by content and tokenizer
    workers: int = knob(0, low=0)  # tokenizing threads; 0: one a core
    prefetch: int = knob(4, low=1)  # batches ready ahead of the device
    threads: int = knob(1, low=1)  # that make batches

    @property
    def where(self) -> str:
        """What names the text, for messages."""
        if self.sources:
            return f"config.data.sources = {', '.join(f'{name} ({path})' for name, path, _ in self.sources)}"
        return f"config.data.path = {', '.join(self.path)}"


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis inside a slice (an NVLink or ICI domain; without slices, in all), and across slices
    (`dcn_`, over the network). One in-slice size may be -1 and takes what is left (read by gpt_jax/sharding/layout.py)."""

    pipeline: int = knob(1, low=-1)  # stages of layers
    data: int = knob(-1, low=-1)  # copies of everything
    fsdp: int = knob(1, low=-1)  # parameters, gradients and optimiser state split, see zero
    expert: int = knob(1, low=-1)  # experts of a mixture split; all other weights as over fsdp
    context: int = knob(1, low=-1)  # the sequence split (ring attention); weights as over fsdp
    tensor: int = knob(1, low=-1)  # heads, feed-forward and vocabulary split
    dcn_pipeline: int = knob(1, low=1)
    dcn_data: int = knob(1, low=1)
    dcn_fsdp: int = knob(1, low=1)
    dcn_expert: int = knob(1, low=1)
    dcn_context: int = knob(1, low=1)
    dcn_tensor: int = knob(1, low=1)
    zero: int = knob(
        3, choices=(1, 3)
    )  # what fsdp splits. 3: parameters, gradients, optimiser state; 1: the last alone


@dataclass(frozen=True)
class Group:
    """Parameters with an optimiser of their own. The first group whose `match` is found in the path takes it."""

    match: str = ".*"  # regular expression searched in paths such as blocks/0/attention/q/kernel
    optimizer: str = knob("adamw", choices=OPTIMIZERS)
    optional: bool = False  # may find no parameter (a part of the model that can be switched off); else that is an error
    rate: float = knob(1.0, low=0.0)  # factor on optim.learning_rate
    b1: float = knob(0.9, low=0.0, high=0.9999)  # momentum of sgd, muon and lion too
    b2: float = knob(0.95, low=0.0, high=0.99999)
    eps: float = knob(1e-8, low=0.0)
    weight_decay: float = knob(0.0, low=0.0)


@dataclass(frozen=True)
class Optim:
    """Optimiser and schedule (read by gpt_jax/train/optim/optimizer.py)."""

    optimizer: str = knob("adamw", choices=OPTIMIZERS)  # of every parameter that no group takes
    learning_rate: float = knob(3e-4, low=0.0)
    b1: float = knob(0.9, low=0.0, high=0.9999)  # momentum of sgd, muon and lion too
    b2: float = knob(0.95, low=0.0, high=0.99999)
    eps: float = knob(1e-8, low=0.0)
    weight_decay: float = knob(0.1, low=0.0)
    decay: str = knob(
        "matrices", choices=("matrices", "all")
    )  # matrices: not biases, norms and scalars
    clip: float = knob(1.0, low=0.0)  # global gradient norm; 0: off
    schedule: str = knob("cosine", choices=SCHEDULES)
    warmup_steps: int = knob(0, low=0)
    decay_steps: int = knob(0, low=0)  # the step at which the schedule ends; 0: train.steps
    decay_fraction: float = knob(0.2, low=0.0, high=1.0)  # wsd: the part of the run that decays
    final_fraction: float = knob(0.1, low=0.0, high=1.0)  # last rate over peak rate
    groups: tuple[Group, ...] = ()
    muon_iterations: int = knob(5, low=1)  # Newton-Schulz steps
    muon_momentum_warmup: int = knob(
        0, low=0
    )  # steps over which Muon's momentum rises from 0.85 to b1; 0: off
    muon_momentum_final: float = knob(
        0.0, low=0.0, high=0.9999
    )  # where Muon's momentum falls to while wsd decays; 0: off
    muon_cautious: bool = False  # decay only where update and weight agree in sign
    muon_decay_to_zero: bool = False  # cosine of Muon's weight decay to zero at decay_steps
    muon_normalize: bool = False  # NorMuon: per-row second moment after orthogonalising (b2)


@dataclass(frozen=True)
class Train:
    """The loop (read by gpt_jax/run/loop.py and gpt_jax/train)."""

    steps: int = knob(1000, low=0)
    batch_size: int = knob(8, low=1)  # rows a step, over all processes and microbatches
    seq_len: int = knob(256, low=2, high=2**30)  # tokens a row
    accumulate: int = knob(1, low=1)  # microbatches a step
    objective: str = knob("next_token", choices=OBJECTIVES)
    z_loss: float = knob(0.0, low=0.0)  # weight of log(Z)^2
    label_smoothing: float = knob(0.0, low=0.0, high=0.99)
    loss_chunk: int = knob(0, low=0)  # tokens of a row whose logits exist at once; 0: all
    ema: float = knob(0.0, low=0.0, high=0.999999)  # decay of averaged weights; 0: off
    hang_minutes: float = knob(30.0, low=0.0)  # exit 41 when no step ends for so long; 0: off


@dataclass(frozen=True)
class Eval:
    """Evaluation and samples during training (read by gpt_jax/evals/heldout.py)."""

    every_steps: int = knob(250, low=0)  # 0: only at the end
    batches: int = knob(0, low=0)  # held-out batches; 0: all of them
    batch_size: int = knob(0, low=0)  # 0: train.batch_size
    sample_every_steps: int = knob(0, low=0)  # 0: only at the end
    sample_prompts: tuple[
        str, ...
    ] = ()  # none: a newline, or the first character that the tokenizer knows
    sample_tokens: int = knob(100, low=1)
    sample_temperature: float = knob(0.8, low=0.0)
    sample_top_k: int = knob(0, low=0, high=2**31 - 1)
    compare_xz: bool = False  # also print what xz -9 makes of the held-out text


@dataclass(frozen=True)
class Checkpoint:
    """When to save and what to keep (read by gpt_jax/train/checkpoint/checkpoints.py)."""

    every_steps: int = knob(1000, low=0)  # 0: only at the end and on request
    every_minutes: float = knob(0.0, low=0.0)  # 0: off
    keep_last: int = knob(2, low=1)
    keep_every_steps: int = knob(0, low=0)  # multiples of this are kept for ever; 0: off
    keep_best: int = knob(0, low=0)  # how many of the best by best_metric; 0: off
    best_metric: str = knob(
        "eval/loss", choices=("eval/loss", "eval/bits_per_byte", "eval/perplexity")
    )


@dataclass(frozen=True)
class Log:
    """What is reported (read by gpt_jax/run/loop.py)."""

    every_steps: int = knob(10, low=1)
    tensorboard: bool = True
    progress: bool = True


@dataclass(frozen=True)
class Config:
    """One run. Sections are handed to the rooms of the same name."""

    seed: int = knob(0, low=0, high=2**32 - 1)
    model: Model = Model()
    compute: Compute = Compute()
    data: Data = Data()
    mesh: Mesh = Mesh()
    optim: Optim = Optim()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()


# Sections and fields that may change when a run resumes: they alter neither the parameters' layout nor their meaning.
RESUMABLE = (
    "log",
    "eval",
    "checkpoint",
    "mesh",
    "compute.kernel",
    "compute.remat",
    "compute.unroll",
    "compute.shard_sequence",
    "compute.pipeline_rounds",
    "compute.pipeline_microbatches",
    "compute.compiler_options",
    "train.steps",
    "train.hang_minutes",
    "train.accumulate",
    "train.loss_chunk",
    "data.path",
    "data.eval_path",
    "data.cache",
    "data.workers",
    "data.prefetch",
    "data.threads",
    "data.source_paths",
    "optim.learning_rate",
    "optim.decay_steps",
)
