"""Each family against a live transformers: other seeds, absent keys, and our own directories.

It needs the extra `reference`, and is left out where that is not installed.
"""

import json

import jax
import numpy as np
import pytest

from gpt_jax.errors import UsageError
from gpt_jax.interop.architecture import read_model
from gpt_jax.interop.export import write_directory
from gpt_jax.interop.families import FAMILIES
from gpt_jax.interop.foreign import open_foreign
from gpt_jax.model.transformer import REFERENCE, Transformer, abstract_params
from gpt_jax.sharding.mesh import join_path

WHY = "needs the extra `reference` (torch and transformers)"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

import make_goldens  # noqa: E402, it imports both

VARIANTS = make_goldens.VARIANTS
SEEDS = (101, 102)


def compute_ours(origin, ids) -> np.ndarray:
    """The logits of a directory that was opened."""

    def read(keys, leaf):
        return origin.read(join_path(keys), tuple(map(slice, leaf.shape)))

    params = jax.tree_util.tree_map_with_path(read, abstract_params(origin.model))
    network = Transformer(origin.model, REFERENCE)
    return np.asarray(jax.jit(network.apply)({"params": params}, {"tokens": ids}))


def compute_theirs(model, ids) -> np.ndarray:
    with torch.no_grad():
        return make_goldens.compute_logits(model, ids).numpy()


def close(ours, theirs, rel=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * np.abs(theirs).max())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal(tmp_path, name, seed):
    model = make_goldens.make_live(name, seed)
    model.save_pretrained(tmp_path)
    ids = make_goldens.draw_ids(seed, 3, 40)
    close(compute_ours(open_foreign(tmp_path), ids), compute_theirs(model, ids))


@pytest.mark.parametrize("name", VARIANTS)
def test_our_directories_open_in_transformers(tmp_path, name):
    """What we write has the same logits there, and the same bits when they save it again."""
    model = make_goldens.make_live(name, SEEDS[0])
    model.save_pretrained(tmp_path / "theirs")
    origin = open_foreign(tmp_path / "theirs")
    write_directory(origin, tmp_path / "ours")

    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    ids = make_goldens.draw_ids(SEEDS[0], 3, 40)
    np.testing.assert_array_equal(compute_theirs(loaded.eval(), ids), compute_theirs(model, ids))

    loaded.save_pretrained(tmp_path / "again")
    again = open_foreign(tmp_path / "again")
    assert again.model == origin.model
    for path, shape in origin.shapes.items():
        index = tuple(map(slice, shape))
        np.testing.assert_array_equal(again.read(path, index), origin.read(path, index))


def to_values(kind: str, settings: dict) -> dict:
    """The `config.json` that transformers writes for these settings."""
    return json.loads(getattr(transformers, kind)(**settings).to_json_string())


def read_or_refuse(values: dict):
    """The model of a config, or "refused"."""
    try:
        return read_model(values)
    except UsageError:
        return "refused"


@pytest.mark.parametrize("name", VARIANTS)
def test_a_key_that_is_absent_means_what_it_means_there(name):
    """Each key alone is left out. We refuse the config, or take transformers' own default."""
    kind, settings = VARIANTS[name]
    values = to_values(kind, settings)
    family = FAMILIES[values["model_type"]]
    assert read_model(values)
    wrong = {}
    for key in {key for fact in family.keys for key in fact.names} & values.keys():
        rest = {other: value for other, value in values.items() if other != key}
        ours = read_or_refuse(rest)
        if ours == "refused":
            continue
        theirs = read_or_refuse(to_values(kind, rest))
        if ours != theirs:
            wrong[key] = (ours, theirs)
    assert not wrong
