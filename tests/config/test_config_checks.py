"""Settings that fit neither each other nor the devices are refused.

What is offered instead works.
"""

import itertools

import pytest
from small_configs import fault_lines, made, refuses

from gpt_jax import config
from gpt_jax.config import Mesh, from_dict
from gpt_jax.errors import UsageError


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
            dict(tensor=2),
            dict(model=dict(expert_mlp=48) | MOE, compute=dict(expert_matmul="grouped")),
            ("config.model.expert_mlp = 48", "24 channels", "multiple of 16", "use blocks"),
        ),
        (
            dict(data=8),
            dict(compute=dict(embed_lookup="columns")),
            ("config.compute.embed_lookup = 'columns'", "use auto", "config.mesh.fsdp above 1"),
        ),
        (
            dict(fsdp=8, zero=1),
            dict(compute=dict(embed_lookup="columns")),
            ("config.compute.embed_lookup = 'columns'", "config.mesh.zero=3"),
        ),
        (
            {},
            dict(compute=dict(expert_matmul="blocks")),
            ("config.compute.expert_matmul = 'blocks'", "leave this out"),
        ),
        (
            {},
            dict(model=dict(dispatch="capacity") | MOE, compute=dict(expert_matmul="grouped")),
            ("config.compute.expert_matmul = 'grouped'", "dropless"),
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
        (
            dict(fsdp=2),
            dict(train=dict(reduce_once=True)),
            ("config.train.reduce_once = True", "config.mesh.fsdp = 2", "config.mesh.zero=1"),
        ),
        (
            dict(pipeline=2, context=2),
            dict(train=dict(reduce_once=True)),
            ("config.mesh.pipeline = 2 and config.mesh.context = 2; set false",),
        ),
        (
            dict(data=2, tensor=4),
            dict(train=dict(reduce_once=True), model=dict(dropout=0.1)),
            ("config.model.dropout = 0.1", "2 copies", "config.train.reduce_once=false"),
        ),
        (
            dict(data=8),
            dict(train=dict(reduce_once=True), compute=dict(dtype="bfloat16", matmul_dtype="fp8")),
            ("config.compute.matmul_dtype = 'fp8'", "8 copies", "config.train.reduce_once=false"),
        ),
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
        (
            {},
            dict(
                compute=dict(remat="names", remat_save=("attention_out",)),
                model=dict(parallel=True),
            ),
            ("config.compute.remat_save = ", "config.model.parallel = True"),
        ),
    ],
)
def test_check_refuses_what_does_not_divide_over_the_mesh(mesh, sections, words):
    mesh = dict(data=-1) | mesh
    lines = fault_lines(made(**sections, mesh=mesh))
    assert any(all(word in line for word in words) for line in lines), lines
