"""The mesh that a checkpoint is read onto."""

import pytest

from gpt_jax import config
from gpt_jax.run.restore import pick_mesh

WIDE = dict(embed=64, heads=8, kv_heads=8, mlp=128, vocab=64)


@pytest.mark.parametrize(
    "change, is_decoding, wanted",
    [
        ({}, False, {"fsdp": 8}),
        ({}, True, {"tensor": 8}),
        ({"kv_heads": 2}, True, {"fsdp": 4, "tensor": 2}),
        ({"kv_heads": 1}, True, {"fsdp": 8}),
        ({"embed": 36, "heads": 4, "kv_heads": 4, "head_dim": 9}, False, {"data": 8}),
        (
            {"experts": 4, "expert_mlp": 12, "pattern": (("attention", "moe"),)},
            True,
            {"fsdp": 2, "tensor": 4},
        ),
    ],
)
def test_weights_are_split_as_they_are_used(change, is_decoding, wanted):
    model = config.resolve(config.Config(model=config.Model(**{**WIDE, **change}))).model
    mesh = pick_mesh(model, 8, is_decoding)
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == wanted
