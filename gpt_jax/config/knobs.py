"""How a field of a config is declared, and the names that fields may choose from."""

from dataclasses import Field, field, fields, is_dataclass
from typing import Any, TypeGuard

NORMS = ("layernorm", "rmsnorm", "plain_rmsnorm", "unit_rmsnorm")
NORM_POSITIONS = ("pre", "post", "sandwich", "branch")
ROPE_SCALINGS = ("llama3", "linear")
QK_NORMS = ("head", "all")
BIASED = ("none", "qkv", "attention", "mlp")
POSITIONS = ("learned", "rotary", "sinusoidal", "none")
MIXERS = ("attention",)
DENSE_FFNS = ("relu", "gelu", "gelu_tanh", "relu2", "swiglu", "geglu")
FFNS = (*DENSE_FFNS, "moe")
ROUTERS = ("softmax", "sigmoid")
BALANCES = ("none", "aux", "bias")
DISPATCHES = ("dropless", "capacity")
KERNELS = ("auto", "reference", "blocked", "ring", "xla", "cudnn", "flash", "splash")
EXPERT_MATMULS = ("auto", "blocks", "sorted", "grouped")
EMBED_LOOKUPS = ("auto", "tables", "columns")
REMATS = ("none", "block", "dots", "offload", "names")
INITS = ("gpt2", "xavier", "modern")
OPTIMIZERS = ("adamw", "adafactor", "lion", "sgd", "muon")
MUON_SCALES = ("shape", "adam")
LORA_VARIANTS = ("lora", "rslora", "dora")
SCHEDULES = ("constant", "cosine", "linear", "wsd", "inverse_sqrt")
ENDLESS = ("constant", "inverse_sqrt")  # schedules without a last step
PACKINGS = ("window", "chunk", "document", "first_fit", "best_fit")
WEIGHTS = ("tokens", "documents")
SPLITS = ("tail", "document")
TOKEN_TYPES = ("auto", "uint16", "uint32")
OBJECTIVES = ("next_token",)
EVALUATORS = ("heldout", "samples", "xz", "questions", "classification")
MEMORIES = ("device", "host")
MATMULS = ("compute", "fp8")
DTYPES = ("float32", "bfloat16")  # float16 would need loss scaling
REDUCE_DTYPES = ("compute", "float32")

# The largest whole number of a field without a smaller limit. Devices count in 32 bits.
MOST = 2**31 - 1


def knob(default, text: str, *, low=None, high=None, choices=None, entries="names") -> Any:
    """A dataclass field with its help and its limits.

    `text` is printed as it stands by `--describe_config` and in docs/configs.md. A value must lie
    in `low <= value <= high`, or be one of `choices`. Whole numbers without a `high` end at MOST.
    `entries` is for a tuple of texts: a row of
    read.ENTRIES, which says what a comma in command-line text means.
    """
    metadata = {"help": text, "low": low, "high": high, "choices": choices, "entries": entries}
    return field(default=default, metadata=metadata)


def key_of(name: str) -> str:
    """The key of a field. A field whose key is a word of Python ends in "_", such as `from_`."""
    return name.removesuffix("_")


def fields_of(kind) -> dict[str, Field]:
    """The fields of a section by their keys."""
    return {key_of(spec.name): spec for spec in fields(kind)}


def is_section(kind) -> TypeGuard[type]:
    """Whether a type of a field is a section: a dataclass with fields of its own."""
    return isinstance(kind, type) and is_dataclass(kind)
