"""Documents of a row stay apart in the whole model, whatever parts it has."""

from dataclasses import replace

import pytest

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.model import leaks
from gpt_jax.model.transformer import Transformer

MOE = (("attention", "moe"),)
MODELS = {
    "gpt2": {},
    "modern": dict(
        position="rotary",
        init="modern",
        qk_norm=True,
        value_embed=True,
        residual_scalars=True,
        smear=True,
        backout=True,
        windows=(4, 0),
        kv_heads=2,
    ),
    "experts": dict(pattern=MOE, experts=8, shared_experts=1, balance="bias", router="sigmoid"),
    "capacity": dict(pattern=MOE, experts=8, dispatch="capacity"),
}


def make_model(name: str) -> config.Model:
    model = config.Model(layers=6, embed=64, heads=4, vocab=300, **MODELS[name])
    return config.resolve(config.Config(model=model)).model


@pytest.mark.parametrize("name", [name for name in MODELS if name != "capacity"])
def test_sound_models_keep_documents_apart(name):
    model = make_model(name)
    assert leaks.measure_leak(model) < 1e-5
    assert "the whole model keeps them apart" in leaks.check_leaks(model)


def test_a_capacity_is_found():
    """The check of the config refuses it before that, with the way out."""
    with pytest.raises(
        UsageError, match=r"config\.data\.document_mask = True: a part of this model"
    ):
        leaks.check_leaks(make_model("capacity"))


def test_a_part_that_looks_along_the_row_is_found(monkeypatch):
    embed = Transformer._embed

    def blurred(self, tokens, position, is_shared):
        x = embed(self, tokens, position, is_shared)
        return x + 0.1 * x.mean(1, keepdims=True)

    monkeypatch.setattr(Transformer, "_embed", blurred)
    with pytest.raises(UsageError, match="lets a document change the one after it"):
        leaks.check_leaks(make_model("gpt2"))


def test_the_twin_has_the_parts_of_its_model():
    model = make_model("modern")
    twin = leaks.make_twin(model)
    sizes = ["layers", "embed", "heads", "kv_heads", "head_dim", "mlp", "expert_mlp", "vocab"]
    sizes += ["max_seq", "experts", "experts_per_token", "value_embed_gate", "smear_gate"]
    assert replace(twin, **{name: getattr(model, name) for name in sizes}) == model
