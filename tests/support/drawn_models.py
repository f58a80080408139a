"""Models whose parameters are drawn by path, to be written and read."""

import numpy as np

from gpt_jax.data import resolve_tokenizer
from gpt_jax.interop.architecture import resolve_model
from gpt_jax.interop.origin import Origin
from gpt_jax.interop.weights import list_shapes

LLAMA = dict(
    layers=3,
    embed=16,
    heads=4,
    kv_heads=2,
    mlp=24,
    vocab=260,
    max_seq=32,
    norm="rmsnorm",
    position="rotary",
    pattern=(("attention", "swiglu"),),
    bias=False,
    tied=False,
)
NO_FAMILY = LLAMA | dict(residual_scalars=True)
EXPERTS = LLAMA | dict(pattern=(("attention", "moe"),), experts=4, expert_mlp=12, mlp=12)


def draw(seed: int, path: str, shape) -> np.ndarray:
    rng = np.random.default_rng([seed, *path.encode()])
    return rng.standard_normal(shape, np.float32) * 0.1


def make_origin(fields=LLAMA, seed=0, tokenizer="bytes") -> Origin:
    """A model whose parameters are drawn by path."""
    model = resolve_model(fields)
    shapes = list_shapes(model)
    found = resolve_tokenizer(tokenizer)
    return Origin(
        "drawn", model, shapes, lambda path, index: draw(seed, path, shapes[path])[index], found, {}
    )


def read_all(origin: Origin) -> dict[str, np.ndarray]:
    return {
        path: origin.read(path, tuple(map(slice, shape))) for path, shape in origin.shapes.items()
    }


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for path, values in ours.items():
        np.testing.assert_array_equal(values, theirs[path], err_msg=path)
