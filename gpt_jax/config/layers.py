"""What each layer of a model is, and how layers repeat."""

from functools import lru_cache
from typing import NamedTuple

from gpt_jax.config.model_fields import Model


class LayerSpec(NamedTuple):
    mixer: str
    ffn: str
    window: int
    value_embed: bool


class Layout(NamedTuple):
    """`repeats` times the layers `period`, then the layers `tail`."""

    period: tuple[LayerSpec, ...]
    repeats: int
    tail: tuple[LayerSpec, ...]


def layer_specs(model: Model) -> tuple[LayerSpec, ...]:
    """One row a layer: patterns tiled over depth."""
    layers, last = model.layers, model.layers - 1

    def window(i):
        return 0 if i == last and model.last_window_full else model.windows[i % len(model.windows)]

    return tuple(
        LayerSpec(
            *model.pattern[i % len(model.pattern)],
            window(i),
            model.value_embed and (last - i) % 2 == 0,
        )
        for i in range(layers)
    )


@lru_cache  # a plan asks for every mesh
def layout(specs: tuple[LayerSpec, ...]) -> Layout:
    """The split that compiles the fewest layers."""

    def split(size):
        repeats = 1
        while specs[repeats * size : (repeats + 1) * size] == specs[:size]:
            repeats += 1
        return Layout(specs[:size], repeats, specs[repeats * size :])

    return min(
        map(split, range(1, len(specs) + 1)), key=lambda found: len(found.period) + len(found.tail)
    )
