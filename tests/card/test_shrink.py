"""The tiny shape of each shipped row keeps its features, and runs on a CPU."""

import runpy

import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.card.shrink import EXPERTS, LENGTH, shrink
from gpt_jax.card.subject import resolve_row
from gpt_jax.commands.config_file import load_config
from gpt_jax.model import count_params

CARDS = runpy.run_path(str(runs.ROOT / "benchmarks/cards.py"))
ROWS = CARDS["ROWS"]

# What must be as in the row. Sizes are checked by their ratios below.
KEPT = {
    "attention_dropout", "attention_softcap", "backout", "balance", "bias", "biased", "dispatch",
    "dropout", "embed_norm", "embed_scale", "expert_ffn", "final_norm", "init", "logit_softcap",
    "norm", "norm_epsilon", "norm_position", "parallel", "pattern", "position", "qk_norm",
    "qk_norm_after_rope", "qk_scale", "residual_scalars", "rope_base", "rope_scale_factor",
    "router", "router_normalize", "shared_experts", "smear", "tied", "value_embed",
}  # fmt: skip


def test_every_config_has_a_card():
    files = {path.name for path in (runs.ROOT / "configs").glob("*.py")}
    assert files - CARDS["WITHOUT_SHAPE"] == {name.partition(":")[0] for name in ROWS}


@pytest.mark.parametrize("name", ROWS)
def test_features_stay(name):
    row = resolve_row(load_config(f"{runs.ROOT}/configs/{name}", list(ROWS[name])))
    assert row.model.vocab > 0
    small = configs.resolve(shrink(row), 257)
    old = row.model
    new = small.model
    assert [field for field in KEPT if getattr(old, field) != getattr(new, field)] == []
    assert new.heads * old.kv_heads == old.heads * new.kv_heads
    assert new.embed == new.heads * new.head_dim
    assert new.mlp / new.embed == pytest.approx(old.mlp / old.embed, rel=0.1)
    assert new.experts == min(old.experts, EXPERTS)
    assert [w > 0 for w in new.windows] == [w > 0 for w in old.windows]
    assert max(new.windows) < LENGTH

    periods = [
        {spec._replace(window=spec.window > 0) for spec in configs.layer_specs(model)}
        for model in (old, new)
    ]
    assert periods[0] == periods[1]
    assert count_params(new)["total"] < 1_000_000
    assert (small.data.packing, small.data.document_mask) == (
        row.data.packing,
        row.data.document_mask,
    )
    assert small.optim.groups == row.optim.groups
    configs.check(small, 1, 257)
