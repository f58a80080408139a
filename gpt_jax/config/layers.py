"""What each layer of a model is, and how layers repeat."""

from functools import lru_cache
from typing import NamedTuple

from gpt_jax.config.model_fields import Model


class LayerSpec(NamedTuple):
    """One layer."""

    mixer: str
    ffn: str
    window: int
    value_embed: bool


class Layout(NamedTuple):
    """The layers `period`, repeated `repeats` times, and then the layers `tail`."""

    period: tuple[LayerSpec, ...]
    repeats: int
    tail: tuple[LayerSpec, ...]


def layer_specs(model: Model) -> tuple[LayerSpec, ...]:
    """The layers of a model: its patterns, tiled over depth."""
    last = model.layers - 1

    specs = []
    for i in range(model.layers):
        mixer, ffn = model.pattern[i % len(model.pattern)]
        window = model.windows[i % len(model.windows)]
        if i == last and model.last_window_full:
            window = 0
        has_values = model.value_embed and (last - i) % 2 == 0
        specs.append(LayerSpec(mixer, ffn, window, has_values))
    return tuple(specs)


# The matmuls that have a bias where the model's `bias` is false, by its field `biased`.
BIASED_PARTS = {
    "none": (),
    "qkv": ("qkv",),
    "attention": ("qkv", "attention_out"),
    "mlp": ("mlp",),
}


def has_bias(model: Model, part: str) -> bool:
    """Whether the matmuls `qkv`, `attention_out` or `mlp` of a layer have biases."""
    if model.bias:
        return model.qkv_bias or part != "qkv"
    return part in BIASED_PARTS[model.biased]


def has_experts(model: Model) -> bool:
    """Whether a layer of the model is a mixture of experts."""
    return any(ffn == "moe" for _, ffn in model.pattern[: model.layers])


@lru_cache  # A plan asks for every mesh.
def layout(specs: tuple[LayerSpec, ...]) -> Layout:
    """The split that compiles the fewest layers."""

    def split(size):
        repeats = 1
        while specs[repeats * size : (repeats + 1) * size] == specs[:size]:
            repeats += 1
        return Layout(specs[:size], repeats, specs[repeats * size :])

    def compiled_layers(plan):
        return len(plan.period) + len(plan.tail)

    return min(map(split, range(1, len(specs) + 1)), key=compiled_layers)
