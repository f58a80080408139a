"""What a config may say, and the line that comes back if it may not."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict
from small_configs import made, refuses

from gpt_jax import config
from gpt_jax.config import Config, from_dict
from gpt_jax.config.knobs import key_of


def test_nothing_said_is_the_defaults():
    assert from_dict({}) == Config() == from_dict(ConfigDict())


def test_a_config_dict_is_a_mapping_too():
    values = dict(
        seed=3,
        model=dict(layers=2, windows=(4, 0)),
        optim=dict(groups=(dict(match="x", rate=2.0),)),
    )
    assert (
        from_dict(ConfigDict(values))
        == from_dict(values)
        == from_dict(ConfigDict(values).to_dict())
    )
    assert from_dict(values).optim.groups == (config.Group(match="x", rate=2.0),)


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(modle={}), ("config.modle", "did you mean config.model?")),
        (
            dict(model=dict(layer=3)),
            ("config.model.layer = 3", "did you mean config.model.layers?"),
        ),
        (dict(optim=dict(lerning_rate=1e-3)), ("did you mean config.optim.learning_rate?",)),
        (dict(mesh=dict(zzz=1)), ("config.mesh.zzz = 1", "known keys: pipeline, data, fsdp")),
        (
            dict(optim=dict(groups=({"mach": "x"},))),
            ("config.optim.groups[0].mach", "did you mean", ".match?"),
        ),
    ],
)
def test_unknown_keys_name_the_nearest(values, words):
    refuses(lambda: from_dict(values), "unknown key", *words)


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(model=dict(layers=2.5)), ("config.model.layers = 2.5", "expected int", "float")),
        (dict(model=dict(layers=2.0)), ("config.model.layers", "expected int")),
        (dict(model=dict(layers="2")), ("config.model.layers = '2'", "expected int", "str")),
        (dict(model=dict(layers=True)), ("config.model.layers", "expected int", "bool")),
        (dict(model=dict(layers=None)), ("config.model.layers", "expected int")),
        (dict(model=dict(bias=1)), ("config.model.bias = 1", "expected bool")),
        (dict(model=dict(norm=3)), ("config.model.norm", "expected str")),
        (dict(optim=dict(learning_rate="3e-4")), ("config.optim.learning_rate", "expected float")),
        (dict(optim=dict(learning_rate=float("nan"))), ("config.optim.learning_rate", "finite")),
        (dict(optim=dict(learning_rate=float("inf"))), ("config.optim.learning_rate", "finite")),
        (dict(model=dict(windows=4)), ("config.model.windows = 4", "tuple")),
        (dict(model=dict(windows=(4, 0.5))), ("config.model.windows[1] = 0.5", "expected int")),
        (dict(model=dict(pattern=("attention", "gelu"))), ("config.model.pattern[0]", "tuple")),
        (dict(model=dict(pattern=(("attention",),))), ("config.model.pattern[0]", "2 entries")),
        (dict(data=dict(path=3)), ("config.data.path = 3", "tuple")),
        (dict(model=3), ("config.model = 3", "section")),
    ],
)
def test_wrong_types(values, words):
    refuses(lambda: from_dict(values), *words)


def test_what_bends_ints_to_floats_lists_to_tuples_one_path_to_many():
    values = dict(optim=dict(learning_rate=1), model=dict(windows=[4, 0]), data=dict(path="a.txt"))
    made = from_dict(values)
    assert (made.optim.learning_rate, made.model.windows, made.data.path) == (
        1.0,
        (4, 0),
        ("a.txt",),
    )
    assert type(made.optim.learning_rate) is float


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(model=dict(layers=0)), ("config.model.layers = 0", "from 1 to 10000")),
        # Larger numbers would end in tracebacks of libraries that count in 32 bits.
        (dict(train=dict(steps=10**30)), ("config.train.steps = 1000", "at most 2147483647")),
        (dict(model=dict(embed=10**30)), ("config.model.embed = 1000", "from 1 to 262144")),
        (dict(model=dict(dropout=1.0)), ("config.model.dropout = 1.0", "from 0.0 to 0.99")),
        (dict(optim=dict(b2=1.0)), ("config.optim.b2",)),
        (dict(optim=dict(learning_rate=-1.0)), ("config.optim.learning_rate = -1.0", "at least 0")),
        (dict(optim=dict(groups=({"rate": -1.0},))), ("config.optim.groups[0].rate",)),
        (
            dict(model=dict(norm="batchnorm")),
            ("config.model.norm = 'batchnorm'", "layernorm, rmsnorm, plain_rmsnorm"),
        ),
        (dict(optim=dict(schedule="cosin")), ("config.optim.schedule", "choose one of", "cosine")),
        (dict(mesh=dict(dcn_data=-1)), ("config.mesh.dcn_data = -1",)),
        (dict(mesh=dict(zero=2)), ("config.mesh.zero = 2", "1, 3")),
        (dict(model=dict(dispatch="dropfew")), ("config.model.dispatch", "dropless, capacity")),
        (dict(mesh=dict(data=-2)), ("config.mesh.data = -2",)),
    ],
)
def test_out_of_range(values, words):
    refuses(lambda: from_dict(values), *words)


@pytest.mark.parametrize("kind", [Config, config.Group])
def test_every_default_is_within_its_own_limits(kind):
    from_dict(config.to_dict(kind()), kind)


def test_json_round_trip():
    original = made(
        model=dict(windows=(8, 0), pattern=(("attention", "relu2"), ("attention", "swiglu"))),
        seed=7,
        optim=dict(groups=(dict(match="^head/", optimizer="lion"), dict(match="kernel"))),
        data=dict(path=("a", "b")),
    )
    assert from_dict(json.loads(config.to_json(original))) == original
    assert from_dict(config.to_dict(original)) == original


def test_json_is_complete():
    assert set(config.flatten(Config())) == {"seed", "data.sources.paths", "eval.sets.paths"} | {
        f"{section.name}.{key_of(field.name)}"
        for section in dataclasses.fields(Config)
        if section.name != "seed"
        for field in dataclasses.fields(section.type)
    }


def test_resolve_fills_in_what_zero_leaves_open():
    filled = config.resolve(
        from_dict(
            dict(
                model=dict(embed=96, heads=3, vocab_multiple=64),
                train=dict(steps=50, batch_size=6, seq_len=33),
            )
        ),
        1000,
    )
    model = filled.model

    assert (model.kv_heads, model.head_dim, model.mlp, model.max_seq, model.vocab) == (
        3,
        32,
        384,
        33,
        1024,
    )
    assert (filled.optim.decay_steps, filled.eval.batch_size) == (50, 6)
    assert config.resolve(filled, 1000) == filled


def test_resolve_leaves_what_is_said():
    said = dict(kv_heads=1, head_dim=16, mlp=7, max_seq=999, vocab=300)
    filled = config.resolve(
        from_dict(dict(model=said, optim=dict(decay_steps=9), eval=dict(batch_size=3))), 256
    )
    assert {name: getattr(filled.model, name) for name in said} == said
    assert (filled.optim.decay_steps, filled.eval.batch_size) == (9, 3)


def test_a_platform_without_habits_is_named_and_so_are_those_that_have_them():
    refuses(lambda: config.find_habits("metal"), "'metal'", "cpu, gpu, tpu")
    assert config.find_habits("tpu", "TPU v5e") != config.find_habits("tpu", "TPU v4")


@pytest.mark.parametrize(
    "kind, has_grouped",
    [("NVIDIA A100-SXM4-80GB", True), ("NVIDIA H100 PCIe", True), ("Tesla V100-SXM2-16GB", False)],
)
def test_experts_multiply_as_asked_or_not_at_all(kind, has_grouped):
    """A line about the habits tells what can be asked for, and GPUs that cannot keep to blocks."""
    habits = config.find_habits("gpu", kind)
    line = config.describe_habits(habits, True, False)
    assert line.count("experts by blocks") == 1
    assert ("compute.expert_matmul can be grouped" in line) == has_grouped
    assert config.choose_expert_matmul("auto", habits, kind).expert_matmuls == ("blocks",)

    if has_grouped:
        chosen = config.choose_expert_matmul("grouped", habits, kind)
        assert "experts by Triton's grouped matmul" in config.describe_habits(chosen, True, False)
    else:
        refuses(
            lambda: config.choose_expert_matmul("grouped", habits, kind),
            f"config.compute.expert_matmul = 'grouped': {kind} does not have it",
            "choose auto or blocks",
        )
