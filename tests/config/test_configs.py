"""Every file in configs/ loads, agrees with itself and imports nothing.

Its model has the published number of parameters.
"""

import ast
import dataclasses
import importlib.util
import json
import math
import re
from pathlib import Path

import jax
import pytest

from gpt_jax import config, sharding
from gpt_jax.config import knobs, layers
from gpt_jax.data.stream import rows
from gpt_jax.data.tokens import split
from gpt_jax.errors import UsageError
from gpt_jax.evals import evaluators
from gpt_jax.model import block, count, parametrization, remat, transformer
from gpt_jax.model.attention import kernels
from gpt_jax.model.layers import linear, mlp, norms, positions
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.train import lora, objectives
from gpt_jax.train.optim import groups, optimizer, schedule

FOLDER = Path(__file__).parents[2] / "configs"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.py"))}
VARIANTS = {
    "finetune": ("chat", "classify", "translate"),
    "gpt2": ("124m", "350m", "774m", "1558m"),
    "guide": ("",),
    "llama": ("1b", "8b", "70b"),
    "mixture": ("",),
    "moe": ("8x7b", "small"),
    "modern": ("d1", "d2", "d3", "d7", "d12", "d20", "d26", "d12-windows"),
    "quickstart": ("",),
    "shakespeare_char": ("cpu", "gpu"),
    "tiny": ("",),
}
FOLDERS = {"mixture"}  # whose argument is a folder, any
ALL = [(name, arg) for name, args in VARIANTS.items() for arg in args]
VOCABS = {
    "finetune": 4096,
    "quickstart": 4096,
    "mixture": 4096,
    "moe": 4096,
    "shakespeare_char": 65,
    "tiny": 257,
}  # of the tokenizer, where the config follows it


def module(name):
    found = importlib.util.spec_from_file_location(name, FILES[name])
    loaded = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))  # as the commands do: a config may import its neighbours
        found.loader.exec_module(loaded)
    return loaded


def load(name, arg="", **model):
    get_config = module(name).get_config
    values = (get_config(arg) if arg else get_config()).to_dict()
    values["model"] |= model
    return config.resolve(config.from_dict(values), VOCABS.get(name, 0))


def sizes(model):
    leaves = jax.tree_util.tree_leaves_with_path(transformer.abstract_params(model))
    return {sharding.join_path(path): math.prod(leaf.shape) for path, leaf in leaves}


def counted(model, pattern):
    return sum(size for path, size in sizes(model).items() if re.search(pattern, path))


def total(model):
    return count.count_params(model)["total"]


def test_every_file_is_listed_here():
    assert set(FILES) == set(VARIANTS)


@pytest.mark.parametrize("name, arg", ALL)
def test_loads_agrees_and_takes_a_shape(name, arg):
    loaded = load(name, arg)
    config.check(loaded, devices=1, tokenizer_vocab=VOCABS.get(name, loaded.model.vocab))
    model = transformer.Transformer(loaded.model)
    params = transformer.abstract_params(loaded.model)
    tokens = {"tokens": jax.ShapeDtypeStruct((1, loaded.train.seq_len), "int32")}
    logits = jax.eval_shape(lambda p, batch: model.apply({"params": p}, batch), params, tokens)
    assert (logits.shape, logits.dtype) == (
        (1, loaded.train.seq_len, loaded.model.vocab),
        "float32",
    )


@pytest.mark.parametrize("name, arg", ALL)
def test_optimiser_and_schedule_fit_the_parameters(name, arg):
    loaded = load(name, arg)
    params = transformer.abstract_params(loaded.model)
    rows = groups.describe_groups(loaded.optim, params, describe_parameter)
    assert sum(row.parameters for row in rows) == total(loaded.model)
    factor = schedule.make_schedule(loaded.optim)
    assert float(factor(loaded.optim.warmup_steps)) == 1.0
    if loaded.optim.schedule not in config.ENDLESS:
        assert float(factor(loaded.train.steps)) == pytest.approx(loaded.optim.final_fraction)


@pytest.mark.parametrize("name, arg", ALL)
def test_names_sections_only_and_survives_json(name, arg):
    values = module(name).get_config(*([arg] if arg else [])).to_dict()
    assert set(values) <= set(config.to_dict(config.Config()))
    loaded = load(name, arg)
    assert config.from_dict(json.loads(config.to_json(loaded))) == loaded


@pytest.mark.parametrize(
    "name, arg",
    [(name, arg) for name in VARIANTS if name not in FOLDERS for arg in ("no-such-thing", "124M")]
    + [("modern", arg) for arg in ("12", "d", "d0", "d-1", "dx", "d12-", "d12-window", "d1.5", "")],
)
def test_unknown_variants_are_one_line(name, arg):
    with pytest.raises(ValueError) as error:
        module(name).get_config(arg)
    message = str(error.value)
    assert "\n" not in message and name in message and (arg in message)
    for variant in VARIANTS[name] if name != "modern" else ("dN", "dN-windows"):
        assert variant in message


@pytest.mark.parametrize("name", VARIANTS)
def test_the_default_variant_is_one_of_them(name):
    default = module(name).get_config.__defaults__[0]
    assert default in VARIANTS[name] or name in FOLDERS


@pytest.mark.parametrize("name", VARIANTS)
def test_the_docstring_is_a_lab_notebook(name):
    text = ast.get_docstring(ast.parse(FILES[name].read_text()))
    assert f"--config=configs/{name}.py" in text
    for variant in VARIANTS[name] if name not in ("modern", "quickstart") else ():
        assert variant in text


# The sources' own numbers: OpenAI's, Meta's and Mistral's released weights.
@pytest.mark.parametrize(
    "name, arg, published",
    [
        ("gpt2", "124m", 124_439_808),
        ("gpt2", "350m", 354_823_168),
        ("gpt2", "774m", 774_030_080),
        ("gpt2", "1558m", 1_557_611_200),
        ("llama", "1b", 1_235_814_400),
        ("llama", "8b", 8_030_261_248),
        ("llama", "70b", 70_553_706_496),
        ("moe", "8x7b", 46_702_792_704),
    ],
)
def test_parameters_published(name, arg, published):
    assert total(load(name, arg).model) == published


@pytest.mark.parametrize("arg, millions", [("cpu", 0.80), ("gpu", 10.65)])
def test_parameters_as_nanogpt_prints_them(arg, millions):
    model = load("shakespeare_char", arg).model
    assert round((total(model) - counted(model, "^position/")) / 1e6, 2) == millions


def test_parameters_of_the_guide_by_hand():
    d, ff, vocab = 512, 2048, 50_000
    layer = 4 * (d * d + d) + (d * ff + ff) + (ff * d + d) + 2 * 2 * d
    assert total(load("guide").model) == vocab * d + 1000 * d + 8 * layer + d * vocab


def test_parameters_of_nanochat_d12_part_by_part():
    # nanochat counted its gates among the matrices when they had 32 channels; now they have 12, as
    # here.
    model = load("modern", "d12", value_embed_gate=32).model
    parts = {
        "^embed/": 25_165_824,
        "^head/": 25_165_824,
        "/value_embed/": 150_994_944,
        "^(blocks|tail)/.*/kernel$": 84_935_808,
        "^residual/": 24,
        "^smear/": 24 + 1,
        "^backout/": 1,
    }
    assert {part: counted(model, part) for part in parts} == parts
    assert total(model) == sum(parts.values())
    assert counted(
        load("modern", "d12").model, "^(blocks|tail)/.*/kernel$"
    ) == 84_935_808 - 6 * 6 * (32 - 12)


@pytest.mark.parametrize("arg", ["d1", "d2", "d3", "d7", "d12", "d26"])
def test_modern_derives_from_the_model_that_is_built(arg):
    """The arithmetic in the config gives the parameters that exist."""
    loaded, derived = load("modern", arg), module("modern")
    depth, width = loaded.model.layers, loaded.model.embed
    assert width == loaded.model.heads * 128 and 0 <= width - 64 * depth < 128
    tokens = 12 * (
        counted(loaded.model, "^(blocks|tail)/.*/kernel$") + counted(loaded.model, "^head/")
    )
    assert derived.horizon(depth) == tokens
    batch = loaded.train.batch_size * loaded.train.seq_len
    best = 2**19 * (tokens / derived.horizon(12)) ** 0.383
    assert batch == 2 ** round(math.log2(best))
    assert loaded.train.steps == tokens // batch
    params = transformer.abstract_params(loaded.model)
    rates = {
        row.group.split()[-1]: row.peak_rate
        for row in groups.describe_groups(loaded.optim, params, describe_parameter)
    }
    scale, narrow = math.sqrt(batch / 2**19), (width / 768) ** -0.5
    assert rates == pytest.approx(
        {
            "^head/": 0.008 * narrow * scale,
            "^embed/": 0.3 * narrow * scale,
            "/value_embed/": 0.15 * narrow * scale,
            "^residual/x0$": 0.5 * scale,
            "^residual/x$": 0.005 * scale,
            "^(smear|backout)/": 0.2 * scale,
            "^(blocks|tail)/.*/kernel$": 0.02 * scale,
        }
    )
    decay = loaded.optim.groups[-1].weight_decay
    assert decay == pytest.approx(0.28 * scale * derived.horizon(12) / tokens)


@pytest.mark.parametrize("arg", ["d12", "d20", "d26"])
def test_modern_runs_on_eight_devices_as_it_stands(arg):
    loaded = load("modern", arg)
    assert config.check(loaded, devices=8)["fsdp"] == 8
    assert loaded.train.batch_size // loaded.train.accumulate == 8 * 32


def test_modern_windows():
    full, windows = (
        transformer.layer_specs(load("modern", arg).model) for arg in ("d12", "d12-windows")
    )
    assert {spec.window for spec in full} == {0}
    assert [spec.window for spec in windows] == [512, 512, 512, 0] * 3
    assert transformer.layer_specs(load("modern", "d12-windows", layers=6).model)[-1].window == 0


@pytest.mark.parametrize("name, arg", [("quickstart", ""), ("modern", "d3"), ("modern", "d12")])
def test_every_parameter_of_the_recipe_is_in_a_group_of_its_own_kind(name, arg):
    loaded = load(name, arg)
    params = transformer.abstract_params(loaded.model)
    index = groups.assign(loaded.optim, params, describe_parameter)
    all_groups = groups.groups_of(loaded.optim)
    kinds = {path: all_groups[f"group{i}"].optimizer for path, i in index.items()}
    assert set(index.values()) == set(range(len(loaded.optim.groups)))
    for path, kind in kinds.items():
        assert kind == (
            "muon" if path.startswith(("blocks", "tail")) and path.endswith("/kernel") else "adamw"
        ), path


def test_tiny_fits_every_small_mesh():
    for data, fsdp, tensor in ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)):
        loaded = load("tiny")
        mesh = config.Mesh(data=data, fsdp=fsdp, tensor=tensor)
        assert config.check(dataclasses.replace(loaded, mesh=mesh), devices=8)["tensor"] == tensor


def test_llama_divides_over_tensor_parallel_devices():
    loaded = load("llama", "70b")
    config.check(
        dataclasses.replace(loaded, mesh=config.Mesh(data=1, fsdp=-1, tensor=8)), devices=256
    )


def test_gpt2_names_the_way_to_tensor_parallel():
    loaded = load("gpt2", "124m")
    mesh = config.Mesh(data=1, fsdp=-1, tensor=2)
    with pytest.raises(UsageError, match=r"config.model.vocab = 50257"):
        config.check(dataclasses.replace(loaded, mesh=mesh), devices=8)
    config.check(dataclasses.replace(load("gpt2", "124m", vocab=50304), mesh=mesh), devices=8)


@pytest.mark.parametrize(
    "choices, table",
    [
        (config.NORMS, norms.NORMS),
        (knobs.NORM_POSITIONS, block.NORM_PLACES),
        (knobs.ROPE_SCALINGS, positions.SCALINGS),
        (knobs.BIASED, layers.BIASED_PARTS),
        (config.DENSE_FFNS, mlp.FFNS),
        (config.INITS, parametrization.INITS),
        (config.KERNELS, {"auto"} | set(kernels.KERNELS)),
        (config.MATMULS, linear.MULTIPLIERS),
        (config.REMATS, {"none"} | set(remat.REMATS)),
        (config.MIXERS, block.MIXERS),
        (config.EVALUATORS, evaluators.EVALUATORS),
        (config.OBJECTIVES, objectives.OBJECTIVES),
        (config.LORA_VARIANTS, lora.VARIANTS),
        (config.OPTIMIZERS, optimizer.OPTIMIZERS),
        (config.SCHEDULES, schedule.SCHEDULES),
        (config.PACKINGS, rows.PACKINGS),
        (config.SPLITS, split.SPLITS),
    ],
)
def test_choices_are_the_rows_of_the_tables(choices, table):
    assert sorted(choices) == sorted(table)


def test_only_layers_that_exist_are_experts():
    dense_first = (("attention", "gelu"), ("attention", "moe"))
    assert not config.has_experts(config.Model(layers=1, pattern=dense_first))
    assert config.has_experts(config.Model(layers=2, pattern=dense_first))
