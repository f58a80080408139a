"""The sections `model` and `compute`: what the weights mean, and how the model runs."""

from dataclasses import dataclass

from gpt_jax.config.knobs import (
    BALANCES,
    BIASED,
    DENSE_FFNS,
    DISPATCHES,
    DTYPES,
    EMBED_LOOKUPS,
    EXPERT_MATMULS,
    INITS,
    KERNELS,
    MATMULS,
    NORM_POSITIONS,
    NORMS,
    POSITIONS,
    QK_NORMS,
    REDUCE_DTYPES,
    REMATS,
    ROPE_SCALINGS,
    ROUTERS,
    knob,
)


@dataclass(frozen=True)
class Model:
    """The transformer, as data. These fields decide what the weights mean."""

    layers: int = knob(4, "The number of layers.", low=1, high=10_000)
    embed: int = knob(128, "The width of the residual stream.", low=1, high=2**18)
    heads: int = knob(4, "The number of query heads.", low=1, high=2**14)
    kv_heads: int = knob(
        0, "The number of key and value heads. 0 means as many as `heads`; 1 is multi-query.", low=0
    )
    head_dim: int = knob(0, "The width of a head. 0 means embed / heads.", low=0, high=2**14)
    mlp: int = knob(
        0, "The hidden width of the feed-forward. 0 means 4 * embed.", low=0, high=2**20
    )
    vocab: int = knob(
        0,
        "Rows of the embedding. 0 means the tokenizer's size, rounded up to `vocab_multiple`.",
        low=0,
    )
    vocab_multiple: int = knob(
        1, "The vocabulary is rounded up to this. 64 or 128 keeps the head's matmul aligned.", low=1
    )
    max_seq: int = knob(
        0,
        "The longest context, for learned positions and the KV cache. 0 means train.seq_len.",
        low=0,
        high=2**30,
    )
    pattern: tuple[tuple[str, str], ...] = knob(
        (("attention", "gelu_tanh"),),
        "Pairs of a mixer and a feed-forward. The pattern is tiled over the layers.",
    )
    norm: str = knob("layernorm", "The kind of normalisation.", choices=NORMS)
    norm_epsilon: float = knob(1e-5, "The number added to the variance before its root.", low=0.0)
    norm_position: str = knob(
        "pre",
        "Where a block is normalised: pre, the input of its branches; post, the sum after each "
        "residual; sandwich, input and output of its branches; branch, their output alone.",
        choices=NORM_POSITIONS,
    )
    parallel: bool = knob(
        False,
        "Whether mixer and feed-forward read the same stream and are added to it together.",
    )
    embed_scale: float = knob(1.0, "A factor on the embedded tokens.", low=0.0)
    embed_norm: bool = knob(False, "Whether the stream is normalised right after the embedding.")
    final_norm: bool = knob(True, "Whether the stream is normalised before the head.")
    position: str = knob("learned", "How the model learns of positions.", choices=POSITIONS)
    rope_base: float = knob(10_000.0, "The base of the rotary frequencies.", low=1.0)
    rope_fraction: float = knob(1.0, "The part of a head that rotates.", low=0.0, high=1.0)
    rope_local_base: float = knob(
        0.0,
        "The base of layers with a window, whose frequencies are not scaled. 0 means that they "
        "rotate like the others.",
        low=0.0,
    )
    rope_scaling: str = knob(
        "llama3",
        "Which frequencies are divided by rope_scale_factor: those of long wavelengths (llama3) "
        "or all (linear).",
        choices=ROPE_SCALINGS,
    )
    rope_scale_factor: float = knob(
        1.0, "Frequencies are divided by this for a longer context. 1 is off.", low=1.0
    )
    rope_scale_low: float = knob(
        1.0, "Wavelengths above rope_scale_original_seq / this are divided by the factor.", low=0.0
    )
    rope_scale_high: float = knob(
        4.0, "Wavelengths below rope_scale_original_seq / this stay as they were.", low=0.0
    )
    rope_scale_original_seq: int = knob(
        8192, "The context that the frequencies were trained for.", low=1
    )
    windows: tuple[int, ...] = knob(
        (0,),
        "Keys that a query sees, itself included, tiled over the layers. 0 means all keys.",
    )
    last_window_full: bool = knob(False, "Whether the last layer sees all keys in any case.")
    qk_norm: bool = knob(False, "Whether queries and keys are normalised.")
    qk_norm_over: str = knob(
        "head",
        "What they are normalised over: each head, or all heads together (OLMo 2).",
        choices=QK_NORMS,
    )
    qk_norm_after_rope: bool = knob(
        False, "Whether they are normalised after rotating (nanochat) or before it (Qwen3)."
    )
    qk_scale: float = knob(1.0, "A factor on both q and k after their norm.", low=0.0)
    attention_scale: float = knob(0.0, "The factor on scores. 0 means 1 / sqrt(head_dim).", low=0.0)
    attention_softcap: float = knob(
        0.0, "Scores become c * tanh(score / c) for this c. 0 is off.", low=0.0
    )
    logit_softcap: float = knob(
        0.0, "Logits become c * tanh(logit / c) for this c. 0 is off.", low=0.0
    )
    tied: bool = knob(True, "Whether the head is the transposed embedding.")
    bias: bool = knob(True, "Whether matmuls and LayerNorms have biases.")
    qkv_bias: bool = knob(True, "Whether q, k and v have biases. It needs `bias`.")
    biased: str = knob(
        "none",
        "The matmuls that have biases although `bias` is false: those of q, k and v, all of "
        "attention, or those of the feed-forward.",
        choices=BIASED,
    )
    dropout: float = knob(
        0.0, "The rate of dropout on the embedding and on residual branches.", low=0.0, high=0.99
    )
    attention_dropout: float = knob(
        0.0,
        "The rate of dropout on attention probabilities. Two kernels can do it: reference and "
        "blocked.",
        low=0.0,
        high=0.99,
    )
    value_embed: bool = knob(
        False, "Whether every second layer, the last included, has gated value embeddings."
    )
    value_embed_gate: int = knob(
        12, "Channels of the stream that drive the gate of value embeddings.", low=1
    )
    residual_scalars: bool = knob(
        False, "Whether layer i starts from r_i * x + a_i * x0, where r and a are learned."
    )
    smear: bool = knob(False, "Whether a token gets a gated share of the token before it.")
    smear_gate: int = knob(24, "Channels of the embedding that drive the gate of `smear`.", low=1)
    backout: bool = knob(
        False, "Whether a learned share of the stream halfway up is taken off at the end."
    )
    experts: int = knob(8, "The number of experts of a feed-forward `moe`.", low=1, high=2**14)
    experts_per_token: int = knob(
        2, "The number of experts that a token goes to, highest scores first.", low=1
    )
    expert_mlp: int = knob(0, "The hidden width of one expert. 0 means `mlp`.", low=0, high=2**20)
    expert_ffn: str = knob("swiglu", "The feed-forward that an expert is.", choices=DENSE_FFNS)
    shared_experts: int = knob(
        0, "The number of further experts that every token goes through.", low=0
    )
    router: str = knob("softmax", "How router logits become scores.", choices=ROUTERS)
    router_normalize: bool = knob(True, "Whether the scores of the chosen experts sum to 1.")
    router_z_loss: float = knob(0.0, "The weight of the router's log(Z)^2 in the loss.", low=0.0)
    balance: str = knob(
        "aux",
        "How experts get equal shares: by a loss (aux), or by a bias on the choice.",
        choices=BALANCES,
    )
    balance_weight: float = knob(0.01, "The weight of the balancing loss (aux).", low=0.0)
    balance_rate: float = knob(0.001, "The step of the balancing bias (bias).", low=0.0)
    dispatch: str = knob(
        "dropless",
        "Whether an expert takes all tokens, or leaves out what exceeds its share of a row.",
        choices=DISPATCHES,
    )
    capacity_factor: float = knob(
        1.25, "The share of an expert under `capacity`, in parts of an equal share.", low=0.0
    )
    init: str = knob("gpt2", "The initialisation of the weights.", choices=INITS)


@dataclass(frozen=True)
class Compute:
    """How the model runs. Nothing here changes what the weights mean."""

    dtype: str = knob(
        "float32",
        "The dtype of matmuls. Parameters, losses, logits and the optimiser stay float32.",
        choices=DTYPES,
    )
    reduce_dtype: str = knob(
        "compute",
        "The dtype in which devices sum the gradients of matmul weights and biases: that of "
        "config.compute.dtype, or float32. After bfloat16 matmuls float32 sends twice the bytes.",
        choices=REDUCE_DTYPES,
    )
    matmul_dtype: str = knob(
        "compute",
        "The dtype that linear maps of attention and feed-forwards multiply in. compute means that "
        "of `dtype`; fp8 scales each tensor by its largest entry. Embeddings, head, routers and "
        "experts keep `dtype`.",
        choices=MATMULS,
    )
    kernel: str = knob(
        "auto",
        "The attention kernel. A named kernel runs or raises; auto takes the fastest that can.",
        choices=KERNELS,
    )
    expert_matmul: str = knob(
        "auto",
        "How dropless experts multiply: block by block (blocks), by the grouped matmul of TPUs "
        "(sorted), or by that of some GPUs (grouped, measured on none). A named way runs or "
        "raises; auto takes the platform's.",
        choices=EXPERT_MATMULS,
    )
    embed_lookup: str = knob(
        "auto",
        "How tokens are embedded where a mesh cuts the embedding's columns: each device gathers "
        "the whole table (tables), or devices look up their own columns and exchange them "
        "(columns). auto takes the way that sends fewer bytes.",
        choices=EMBED_LOOKUPS,
    )
    remat: str = knob(
        "none",
        "What the backward pass recomputes. `names` keeps what `remat_save` and `remat_offload` "
        "name, and recomputes all else of a layer.",
        choices=REMATS,
    )
    remat_save: tuple[str, ...] = knob(
        (),
        "Values of each layer that remat `names` keeps on the device: q, k, v, attention, "
        "attention_out, mlp_in, mlp_hidden, mlp_out, experts_in or experts_out "
        "(docs/parallelism.md).",
    )
    remat_offload: tuple[str, ...] = knob(
        (),
        "Values of each layer that remat `names` keeps in the memory of the host: layer_in, or a "
        "name that `remat_save` takes.",
    )
    unroll: int = knob(
        1,
        "Periods of the layer pattern in one iteration of the scan. 0 means all, which compiles "
        "longer.",
        low=0,
    )
    shard_sequence: bool = knob(
        False, "Whether the stream's sequence is split over the axis tensor between matmuls."
    )
    pipeline_rounds: int = knob(
        1, "How often a microbatch goes round the stages. More rounds shrink the bubble.", low=1
    )
    pipeline_microbatches: int = knob(
        0, "Microbatches in the pipeline at a time. 0 means as many as stages.", low=0
    )
    compiler_options: tuple[str, ...] = knob(
        (),
        "Options NAME=VALUE of XLA, added to gpt_jax/hardware/xla_options.py. NAME= leaves one "
        "of those out.",
    )
    ignore_miscompiles: bool = knob(
        False,
        "Whether a run goes on although this machine's compiler is known to give wrong results "
        "(docs/miscompiles.md).",
    )

    @property
    def gradient_dtype(self) -> str:
        """The dtype of a weight's gradient from its matmul on until devices have summed it."""
        return self.dtype if self.reduce_dtype == "compute" else self.reduce_dtype

    @property
    def stream(self) -> str:
        """The logical axis of the stream's sequence between matmuls."""
        return "stream" if self.shard_sequence else "seq"
