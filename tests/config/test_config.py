"""What a config may say, and the line that comes back if it may not."""

import dataclasses
import itertools
import json
import re

import pytest
from ml_collections import ConfigDict

from gpt_jax import config
from gpt_jax.config import Config, Mesh, from_dict
from gpt_jax.config.knobs import key_of
from gpt_jax.config.read import RENAMED
from gpt_jax.errors import UsageError


def refuses(call, *words):
    """`call()` raises UsageError in one line that holds every word."""
    with pytest.raises(UsageError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def made(**sections):
    """A resolved Config for a tokenizer of 256 ids, with a few fields changed."""
    return config.resolve(from_dict(sections), 256)


# from_dict


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


# JSON


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
    assert set(config.flatten(Config())) == {"seed", "data.sources.paths"} | {
        f"{section.name}.{key_of(field.name)}"
        for section in dataclasses.fields(Config)
        if section.name != "seed"
        for field in dataclasses.fields(section.type)
    }


# overrides


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("seed", "7", 7),
        ("train.steps", "1_000", 1000),
        ("train.steps", "1e4", 10_000),
        ("mesh.data", "-1", -1),
        ("optim.learning_rate", "3e-4", 3e-4),
        ("optim.learning_rate", "1", 1.0),
        ("model.bias", "false", False),
        ("model.bias", "True", True),
        ("model.norm", "rmsnorm", "rmsnorm"),
        ("data.path", "a.txt", ("a.txt",)),
        ("data.path", "a.txt,b/*.md", ("a.txt", "b/*.md")),
        ("data.path", "('a,b.txt',)", ("a,b.txt",)),
        ("data.encodings", "utf-8,gb18030", ("utf-8", "gb18030")),
        ("eval.sample_prompts", "Hello, world", ("Hello, world",)),
        ("eval.sample_prompts", "('Hello, world', 'b')", ("Hello, world", "b")),
        ("eval.sample_prompts", "", ()),
        ("data.tokenizer", "bpe:512", "bpe:512"),
        ("model.windows", "0", (0,)),
        ("model.windows", "8,8,0", (8, 8, 0)),
        ("model.windows", "(8, 0)", (8, 0)),
        ("model.pattern", "(('attention','relu2'),)", (("attention", "relu2"),)),
        ("optim.groups", "({'match': 'x'},)", (config.Group(match="x"),)),
        ("optim.groups", "()", ()),
    ],
)
def test_override_by_the_type_of_the_field(key, text, expected):
    values = {"model": {"layers": 2}}
    config.override(values, key, text)
    value = from_dict(values)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)
    assert from_dict(values).model.layers == 2


def test_a_comma_in_a_path_that_is_there_separates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(text):
        values = {}
        config.override(values, "data.path", text)
        return from_dict(values).data.path

    (tmp_path / "part,1.txt").write_text("")
    assert read("part,1.txt") == ("part,1.txt",)
    assert read("part,*.txt") == ("part,*.txt",)
    assert read("part,2.txt") == ("part", "2.txt")

    # Both can be meant, so the user has to say which.
    (tmp_path / "part").mkdir()
    assert read("part,1.txt") == ("part,1.txt",)
    (tmp_path / "1.txt").write_text("")
    with pytest.raises(UsageError) as refusal:
        read("part,1.txt")
    one, several = re.findall(r'"(\(.*?\))"', str(refusal.value))
    assert read(one) == ("part,1.txt",) and read(several) == ("part", "1.txt")


@pytest.mark.parametrize(
    "key, text, words",
    [
        ("modle.layers", "3", ("config.modle", "did you mean config.model?")),
        ("model.layer", "3", ("config.model.layer", "did you mean config.model.layers?")),
        ("model.layers.x", "3", ("config.model.layers.x", "unknown key")),
        ("model", "3", ("config.model", "section", "layers")),
        ("seeds", "3", ("did you mean config.seed?",)),
        ("train.steps", "many", ("config.train.steps = 'many'", "expected int")),
        ("train.steps", "2.5", ("config.train.steps", "expected int")),
        ("train.steps", "2.5e0", ("config.train.steps", "expected int")),
        ("train.steps", "1e999", ("config.train.steps", "expected int")),
        ("train.steps", "", ("config.train.steps", "expected int")),
        ("model.bias", "maybe", ("config.model.bias", "expected bool")),
        ("optim.learning_rate", "fast", ("config.optim.learning_rate", "expected float")),
        ("model.windows", "8,a", ("config.model.windows", "expected tuple")),
        ("model.windows", "(8", ("config.model.windows", "expected tuple")),
    ],
)
def test_override_refuses(key, text, words):
    refuses(lambda: config.override({}, key, text), *words)


def test_an_override_is_checked_like_a_file():
    values = {}
    config.override(values, "optim.learning_rate", "nan")
    refuses(lambda: from_dict(values), "config.optim.learning_rate", "finite")


# resolve


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


# mesh_shape


def test_mesh_shapes_multiply_to_the_devices():
    for devices, data, fsdp, tensor in itertools.product(
        (1, 2, 4, 6, 8), (-1, 1, 2), (-1, 1, 2), (1, 2, -1)
    ):
        try:
            shape = config.mesh_shape(Mesh(data=data, fsdp=fsdp, tensor=tensor), devices)
        except UsageError:
            fixed = [size for size in (data, fsdp, tensor) if size != -1]
            product = 1
            for size in fixed:
                product *= size
            assert len(fixed) < 2 or devices % product or (len(fixed) == 3 and product != devices)
            continue
        assert list(shape) == ["pipeline", "data", "fsdp", "expert", "context", "tensor"]
        assert shape["data"] * shape["fsdp"] * shape["tensor"] == devices
        assert all(
            shape[axis] == size
            for axis, size in dict(data=data, fsdp=fsdp, tensor=tensor).items()
            if size > 0
        )


@pytest.mark.parametrize(
    "mesh, devices, words",
    [
        (dict(data=-1, fsdp=-1), 8, ("config.mesh.fsdp = -1", "only one", "config.mesh.data")),
        (dict(data=0), 8, ("config.mesh.data = 0", "positive")),
        (dict(data=3), 8, ("config.mesh.data = 3", "8 devices", "config.mesh.data=8")),
        (
            dict(data=2, tensor=2),
            8,
            ("config.mesh.data = 2", "8 devices", "config.mesh.data=4 or config.mesh.tensor=4"),
        ),
        (dict(data=1), 8, ("config.mesh.data = 1", "8 devices", "config.mesh.data=8")),
        (
            dict(fsdp=3, tensor=3, data=1),
            8,
            ("config.mesh.fsdp = 3", "config.mesh.fsdp=2 config.mesh.tensor=4"),
        ),
        (
            dict(data=-1, tensor=16),
            8,
            ("config.mesh.tensor = 16", "8 devices", "config.mesh.tensor=8"),
        ),
        (dict(data=-1, fsdp=3, dcn_data=2), 8, ("config.mesh.dcn_data = 2", "config.mesh.fsdp=4")),
        (
            dict(pipeline=2, data=2, fsdp=2, expert=2, context=2, tensor=2, dcn_data=2),
            8960,
            ("config.mesh.fsdp=",),
        ),  # at once
    ],
)
def test_mesh_refuses(mesh, devices, words):
    refuses(lambda: config.mesh_shape(from_dict(dict(mesh=mesh)).mesh, devices), *words)


def test_sizes_across_slices_multiply_those_inside():
    shape = config.mesh_shape(Mesh(data=-1, fsdp=2, dcn_data=2, dcn_pipeline=2), 32)
    assert shape == dict(pipeline=2, data=8, fsdp=2, expert=1, context=1, tensor=1)
    assert config.cross_slice(Mesh(dcn_data=2)) == dict(
        pipeline=1, data=2, fsdp=1, expert=1, context=1, tensor=1
    )


# check


def test_the_defaults_agree():
    assert config.check(made(), devices=8, tokenizer_vocab=256)["data"] == 8


@pytest.mark.parametrize(
    "sections, words",
    [
        (
            dict(model=dict(embed=128, heads=3)),
            ("config.model.heads = 3", "config.model.embed = 128", "head_dim"),
        ),
        (
            dict(model=dict(embed=128, heads=256)),
            ("config.model.heads = 256", "config.model.embed = 128"),
        ),
        (
            dict(model=dict(heads=4, kv_heads=3)),
            ("config.model.kv_heads = 3", "config.model.heads = 4"),
        ),
        (dict(model=dict(heads=4, kv_heads=8)), ("config.model.kv_heads = 8",)),
        (
            dict(model=dict(position="rotary", embed=12, heads=4)),
            ("config.model.rope_fraction", "odd"),
        ),
        (
            dict(model=dict(rope_scale_low=4.0)),
            ("config.model.rope_scale_high = 4.0", "rope_scale_low"),
        ),
        (dict(model=dict(max_seq=64)), ("config.model.max_seq = 64", "config.train.seq_len = 256")),
        (dict(model=dict(pattern=())), ("config.model.pattern", "at least one")),
        (dict(model=dict(windows=())), ("config.model.windows", "at least one")),
        (dict(model=dict(windows=(8, -1))), ("config.model.windows = (8, -1)",)),
        (
            dict(model=dict(pattern=(("mamba", "relu"),))),
            ("config.model.pattern", "'mamba'", "attention"),
        ),
        (
            dict(model=dict(pattern=(("attention", "elu"),))),
            ("config.model.pattern", "'elu'", "swiglu"),
        ),
        (
            dict(model=dict(embed=8, value_embed=True)),
            ("config.model.value_embed_gate = 12", "config.model.embed = 8"),
        ),
        (dict(model=dict(vocab=255)), ("config.model.vocab = 255", "256", "set 0")),
        (
            dict(train=dict(batch_size=8, accumulate=3)),
            ("config.train.batch_size = 8", "config.train.accumulate = 3"),
        ),
        (
            dict(train=dict(loss_chunk=100)),
            ("config.train.loss_chunk = 100", "config.train.seq_len = 256"),
        ),
        (
            dict(optim=dict(warmup_steps=2000)),
            ("config.optim.warmup_steps = 2000", "1000", "lower it"),
        ),
    ],
)
def test_check_refuses(sections, words):
    refuses(lambda: config.check(made(**sections), tokenizer_vocab=256), *words)


def test_a_head_dim_of_its_own_frees_the_heads():
    config.check(made(model=dict(embed=128, heads=3, head_dim=42)))


MOE = dict(pattern=(("attention", "moe"),))


@pytest.mark.parametrize(
    "mesh, sections, words",
    [
        (dict(tensor=8), {}, ("config.model.heads = 4", "config.mesh.tensor = 8")),
        (
            dict(tensor=4),
            dict(model=dict(kv_heads=1)),
            ("config.model.kv_heads = 1", "config.mesh.tensor = 4"),
        ),
        (dict(tensor=4), dict(model=dict(mlp=30)), ("config.model.mlp = 30",)),
        (
            dict(tensor=4),
            dict(model=dict(vocab=257)),
            ("config.model.vocab = 257", "to 260, or to 0", "vocab_multiple to 4"),
        ),
        (
            dict(fsdp=8),
            dict(model=dict(embed=36)),
            ("config.model.embed = 36", "fsdp x expert x context = 8"),
        ),
        (
            dict(context=2),
            dict(train=dict(seq_len=254)),
            ("config.train.seq_len = 254", "config.mesh.context = 4"),
        ),
        (
            dict(context=4),
            dict(train=dict(loss_chunk=2)),
            ("config.train.loss_chunk = 2", "config.mesh.context = 4"),
        ),
        (
            dict(context=2),
            dict(model=dict(attention_dropout=0.1)),
            ("config.model.attention_dropout", "set 0"),
        ),
        (
            dict(tensor=2),
            dict(compute=dict(shard_sequence=True), train=dict(seq_len=255)),
            ("config.train.seq_len = 255",),
        ),
        (
            dict(fsdp=4),
            dict(compute=dict(unroll=2)),
            ("config.compute.unroll = 2", "4 repeats", "= 4 of the mesh"),
        ),
        (
            dict(expert=8),
            dict(model=dict(experts=12) | MOE),
            ("config.model.experts = 12", "config.mesh.expert = 8"),
        ),
        (
            {},
            dict(model=dict(experts=2, experts_per_token=3) | MOE),
            ("config.model.experts_per_token = 3",),
        ),
        (
            dict(tensor=4),
            dict(model=dict(expert_mlp=6) | MOE),
            ("config.model.expert_mlp = 6", "config.mesh.tensor = 4"),
        ),
        (
            dict(context=2),
            dict(model=dict(dispatch="capacity") | MOE),
            ("config.model.dispatch = 'capacity'", "dropless"),
        ),
        (dict(pipeline=8), {}, ("config.model.layers = 4", "config.mesh.pipeline = 8")),
        (
            dict(pipeline=2),
            dict(model=dict(layers=5)),
            ("config.model.layers = 5", "config.mesh.pipeline x"),
        ),
        (
            dict(pipeline=2),
            dict(compute=dict(pipeline_rounds=4)),
            ("config.model.layers = 4", "= 8", "or config.compute.pipeline_rounds=1"),
        ),
        (
            dict(pipeline=4),
            dict(compute=dict(pipeline_microbatches=2)),
            ("config.compute.pipeline_microbatches = 2",),
        ),
        (
            dict(pipeline=4),
            dict(compute=dict(pipeline_microbatches=8)),
            ("config.train.batch_size = 8", "8 x 2"),
        ),
        (dict(pipeline=2), dict(model=dict(dropout=0.1)), ("config.model.dropout = 0.1", "set 0")),
        ({}, dict(eval=dict(batch_size=3)), ("config.eval.batch_size = 3", "8")),
        (
            {},
            dict(model=dict(dispatch="capacity", capacity_factor=0.0) | MOE),
            ("config.model.capacity_factor = 0.0",),
        ),
        (
            {},
            dict(model=dict(dispatch="capacity") | MOE, data=dict(document_mask=True)),
            ("config.model.dispatch = 'capacity'", "config.data.document_mask", "use dropless"),
        ),
        (
            {},
            dict(checkpoint=dict(keep_best=2), eval=dict(every_steps=0)),
            ("config.checkpoint.keep_best = 2", "config.eval.every_steps = 0"),
        ),
        (
            {},
            dict(compute=dict(pipeline_rounds=2)),
            ("config.compute.pipeline_rounds = 2", "without config.mesh.pipeline"),
        ),
        (
            {},
            dict(compute=dict(remat="names", remat_save=("attention", "scores"))),
            ("config.compute.remat_save = ", "'scores' is not known", "attention_out", "mlp_in"),
        ),
        (
            {},
            dict(compute=dict(remat="names", remat_save=("q", "v"), remat_offload=("k", "q"))),
            ("config.compute.remat_offload = ('k', 'q')", "'q' is in both lists"),
        ),
        (
            {},
            dict(compute=dict(remat="names", remat_offload=("experts_in",))),
            ("config.compute.remat_offload = ", "in no layer", "mlp_hidden"),
        ),
        (
            {},
            dict(compute=dict(remat="names", remat_save=("mlp_in",)), model=MOE),
            ("config.compute.remat_save = ", "in no layer", "experts_out"),
        ),
        (
            {},
            dict(compute=dict(remat="names", remat_save=("layer_in",))),
            ("config.compute.remat_save = ", "'layer_in' is kept in any case"),
        ),
        (
            {},
            dict(compute=dict(remat="names", remat_save=("mlp_out",))),
            ("config.compute.remat_save = ", "config.model.norm_position = 'pre'"),
        ),
        (
            {},
            dict(compute=dict(remat="names")),
            ("config.compute.remat = 'names'", "config.compute.remat_save", "use block"),
        ),
        (
            {},
            dict(compute=dict(remat="dots", remat_save=("q",))),
            ("config.compute.remat_save = ('q',)", "config.compute.remat = 'dots'"),
        ),
        (
            {},
            dict(compute=dict(remat_offload=("q",))),
            ("config.compute.remat_offload = ('q',)", "config.compute.remat = 'none'"),
        ),
    ],
)
def test_check_refuses_what_does_not_divide_over_the_mesh(mesh, sections, words):
    mesh = dict(data=-1) | mesh
    lines = fault_lines(made(**sections, mesh=mesh))
    assert any(all(word in line for word in words) for line in lines), lines


def fault_lines(made_config) -> list[str]:
    """What `check` says on eight devices, a line for each fault."""
    with pytest.raises(UsageError) as caught:
        config.check(made_config, devices=8)
    return str(caught.value).split("\n")


def test_meshes_that_the_model_cannot_run_on_are_not_offered():
    sections = dict(model=dict(heads=3, kv_heads=3, embed=24), mesh=dict(data=1, fsdp=2, tensor=3))
    message = refuses(lambda: config.check(made(**sections), devices=8), "config.mesh.tensor = 3")
    assert message.endswith("the nearest that do: config.mesh.fsdp=8 config.mesh.tensor=1")


def test_sizes_across_slices_are_offered_last():
    """They come last because the machine decides them."""
    for mesh, offers in (
        (dict(fsdp=3, dcn_data=2), "config.mesh.fsdp=4"),
        (dict(data=4, dcn_data=4), "config.mesh.data=2"),
        (dict(data=1, dcn_data=3), "config.mesh.dcn_data=8"),
    ):
        message = refuses(
            lambda: config.check(made(mesh=dict(data=1) | mesh), devices=8), "config.mesh.dcn_data"
        )
        assert message.endswith(f"the nearest that do: {offers}"), message


@pytest.mark.parametrize(
    "batch, accumulate, data, fsdp",
    [
        (9, 1, 8, 1),
        (12, 2, 2, 4),
        (4, 1, 8, 1),
        (6, 3, 1, 8),
        (20, 2, 4, 2),
        (1, 1, 2, 4),
        (48, 12, 2, 4),
        (8, 8, 8, 1),
    ],
)
def test_the_batch_size_that_the_error_suggests_works(batch, accumulate, data, fsdp):
    def sections(size):
        return dict(
            train=dict(batch_size=size, accumulate=accumulate), mesh=dict(data=data, fsdp=fsdp)
        )

    words = f"config.train.batch_size = {batch}"
    message = next(line for line in fault_lines(made(**sections(batch))) if line.startswith(words))
    suggested, _, fewer = message.rsplit("try ", 1)[1].partition(", or config.train.accumulate=")
    suggested = int(suggested)
    assert bool(fewer) == (batch % (data * fsdp) == 0)
    if fewer:
        config.check(
            made(train=dict(batch_size=batch, accumulate=int(fewer)), mesh=sections(batch)["mesh"]),
            devices=8,
        )
    assert batch < suggested < batch + 8 * accumulate
    config.check(made(**sections(suggested)), devices=8)


# changes


def test_no_change():
    assert config.changes(Config(), Config()) == []


@pytest.mark.parametrize(
    "sections, resumable",
    [
        (dict(log=dict(every_steps=3)), True),
        (dict(eval=dict(every_steps=3)), True),
        (dict(mesh=dict(fsdp=2)), True),
        (dict(checkpoint=dict(keep_last=9)), True),
        (dict(train=dict(steps=5)), True),
        (dict(compute=dict(remat="block")), True),
        (dict(compute=dict(remat_save=("q",))), True),
        (dict(compute=dict(remat_offload=("q",))), True),
        (dict(optim=dict(state_memory="host")), True),
        (dict(train=dict(accumulate=2)), True),
        (dict(optim=dict(learning_rate=1.0)), True),
        (dict(model=dict(layers=9)), False),
        (dict(model=dict(windows=(4, 0))), False),
        (dict(seed=1), False),
        (dict(train=dict(batch_size=9)), True),
        (dict(train=dict(seq_len=9)), False),
        (dict(data=dict(path=("x",))), True),
        (dict(data=dict(tokenizer="char")), False),
        (dict(optim=dict(groups=(dict(match="x"),))), False),
        (dict(optim=dict(optimizer="lion")), False),
        (dict(optim=dict(weight_decay=0.3)), True),
        (dict(optim=dict(b1=0.8)), False),
        (dict(init={"from": "x"}), False),
    ],
)
def test_changes_name_the_key_and_say_whether_a_run_may_resume(sections, resumable):
    ((section, fields),) = sections.items()
    key = section if not isinstance(fields, dict) else f"{section}.{next(iter(fields))}"
    ((found, before, after, effect),) = config.changes(Config(), from_dict(sections))
    assert (found, before, after, effect is not None) == (
        key,
        config.flatten(Config())[key],
        config.flatten(from_dict(sections))[key],
        resumable,
    )


def test_the_key_from_is_a_word_of_python():
    values = dict(init={"from": "runs/a@3"})
    made = from_dict(values)
    assert made.init.from_ == "runs/a@3"
    assert config.to_dict(made)["init"]["from"] == "runs/a@3" and config.read_saved(values) == made
    typed = {}
    config.override(typed, "init.from", "runs/a@3")
    assert typed == values
    refuses(lambda: from_dict(dict(init=dict(from_="x"))), "did you mean config.init.from?")
    assert "from" in config.make_schema()["properties"]["init"]["properties"]
    assert "--config.init.from=''" in config.describe_config("init.from")


def test_resumable_names_exist():
    known = set(config.flatten(Config())) | {field.name for field in dataclasses.fields(Config)}
    assert set(config.RESUMABLE) <= known


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_an_old_key_is_answered_with_its_new_name(old, new):
    section, key = old.split(".")
    words = f"^config.{old} = .*: is config.{new} now$"
    with pytest.raises(UsageError, match=words):
        config.from_dict({section: {key: 1}})
    with pytest.raises(UsageError, match=words):
        config.override({}, old, "1")


def test_configs_of_earlier_checkpoints_are_translated():
    old = {
        "seed": 3,
        "model": {"layers": 2, "dtype": "bfloat16", "pipeline_rounds": 2},
        "data": {"rows": "chunk", "apart": True, "stages": [[5, [1.0, 2.0]]]},
        "train": {"steps": 7, "compiler_options": ["a=1"]},
    }
    wanted = config.Config(
        seed=3,
        model=config.Model(layers=2),
        compute=config.Compute(dtype="bfloat16", pipeline_rounds=2, compiler_options=("a=1",)),
        data=config.Data(packing="chunk", document_mask=True, phases=((5, (1.0, 2.0)),)),
        train=config.Train(steps=7),
    )

    assert config.read_saved(old) == wanted
    assert config.read_saved(config.to_dict(wanted)) == wanted


# tables of the ground floor


def test_a_platform_without_habits_is_named_and_so_are_those_that_have_them():
    refuses(lambda: config.find_habits("metal"), "'metal'", "cpu, gpu, tpu")
    assert config.find_habits("tpu", "TPU v5e") != config.find_habits("tpu", "TPU v4")


def test_only_layers_that_exist_are_experts():
    dense_first = (("attention", "gelu"), ("attention", "moe"))
    assert not config.has_experts(config.Model(layers=1, pattern=dense_first))
    assert config.has_experts(config.Model(layers=2, pattern=dense_first))
