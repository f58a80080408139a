"""Embeddings are the same by tables and by columns, and columns send what is counted for them.

Shapes: B batch, T sequence, D embed, V vocab.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from programs import list_equations

from gpt_jax import config, sharding
from gpt_jax.model.layers.embed import lookup
from gpt_jax.plan.program.program import read_program
from gpt_jax.sharding.mesh import make_mesh

B, T, D, V = 24, 16, 32, 48
RNG = np.random.default_rng(0)
TABLE = RNG.standard_normal((V, D)).astype(np.float32)
TOKENS = RNG.integers(0, V, (B, T)).astype(np.int32)
GRADIENT = RNG.standard_normal((B, T, D)).astype(np.float32)
WAYS = ("tables", "columns")
MESHES = [
    dict(fsdp=8),
    dict(data=2, fsdp=4),
    dict(fsdp=2, tensor=3),  # Three devices divide no bfloat16 without a rest.
    dict(fsdp=2, context=2, tensor=2),
    dict(expert=2, fsdp=2, data=2),
    dict(pipeline=2, fsdp=2, context=2),
]


def lay_out(mesh, dtype):
    """The table, the tokens and the gradient of what is looked up, on a mesh."""
    rows = sharding.batch_spec()
    stored = sharding.make_spec(sharding.STORED, ("vocab", "embed"))
    arrays = (TABLE, stored), (TOKENS, rows), (GRADIENT.astype(dtype), P(*rows, None))
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in arrays]


def make_programs(dtype, way):
    """(lookup, its transpose), as functions of what `lay_out` gives."""

    def look_up(table, tokens, _):
        return lookup(table, tokens, dtype, way)

    def transpose(table, tokens, gradient):
        _, pull_back = jax.vjp(lambda table: lookup(table, tokens, dtype, way), table)
        return pull_back(gradient)[0]

    return look_up, transpose


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", MESHES)
def test_both_ways_give_the_rows_of_the_table_and_sum_gradients_in_float32(shape, dtype):
    """Rows are equal to the bit, and the gradient is exact but for a sum in another order."""
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    rounded = GRADIENT.astype(dtype).astype(np.float64)
    exact = np.zeros((V, D))
    np.add.at(exact, TOKENS, rounded)

    for way in WAYS:
        with jax.set_mesh(mesh):
            given = lay_out(mesh, dtype)
            look_up, transpose = (jax.jit(program) for program in make_programs(dtype, way))
            rows = look_up(*given)
            gradient = transpose(*given)
        assert rows.dtype == dtype
        np.testing.assert_array_equal(np.asarray(rows), TABLE[TOKENS].astype(dtype))
        assert gradient.sharding.spec == given[0].sharding.spec
        np.testing.assert_allclose(gradient, exact, rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", [dict(fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_a_tied_heads_gradient_is_added_in_float32(shape):
    """Devices sum the head's part in bfloat16, and the sum of both parts is not rounded to it."""
    mesh = make_mesh(shape)
    hidden = RNG.standard_normal((B, T, D)).astype(jnp.bfloat16)

    def multiply(table, hidden):
        head = sharding.use_weight(table, ("vocab", "embed"), jnp.bfloat16)
        layout = sharding.out_spec("batch", "seq", "vocab")
        return jnp.einsum("btd,vd->btv", hidden, head, out_sharding=layout).astype(jnp.float32)

    def find_gradient(way, is_looked_up, is_multiplied):
        def loss(table, tokens, gradient, hidden):
            rows = lookup(table, tokens, jnp.bfloat16, way) * gradient
            looked_up = rows.astype(jnp.float32).sum() if is_looked_up else 0.0
            return looked_up + (multiply(table, hidden).sum() if is_multiplied else 0.0)

        with jax.set_mesh(mesh):
            given = lay_out(mesh, jnp.bfloat16)
            rows = jax.device_put(hidden, given[2].sharding)
            return np.asarray(jax.jit(jax.grad(loss))(*given, rows))

    head = find_gradient("columns", False, True)
    np.testing.assert_array_equal(head, head.astype(jnp.bfloat16).astype(np.float32))
    for way in WAYS:
        both = find_gradient(way, True, True)
        np.testing.assert_array_equal(both, find_gradient(way, True, False) + head)
        assert (both != both.astype(jnp.bfloat16).astype(np.float32)).any()


def count_sent(mesh, way) -> dict[tuple[str, tuple[str, ...]], int]:
    """{(kind, mesh axes): bytes} of the compiled lookup and of its compiled transpose."""
    sent: dict = {}
    for program in make_programs(jnp.float32, way):
        text = jax.jit(program).lower(*lay_out(mesh, jnp.float32)).compile().as_text()
        for row in read_program(text, dict(mesh.shape)).collectives:
            key = row.kind, row.axes
            sent[key] = sent.get(key, 0) + row.bytes * row.calls
    return sent


@pytest.mark.parametrize("shape", [dict(fsdp=8), dict(data=2, fsdp=4)])
def test_compiled_lookups_send_the_bytes_that_the_choice_compares(shape):
    """Numbers of tokens are gathered in both programs here, and once where one program has both."""
    mesh = make_mesh(shape)
    devices = shape["fsdp"]
    tokens = B * T // mesh.size
    sizes = config.LookupSizes(rows=V, width=D, tokens=tokens, devices=devices, entry=4)
    counted = config.count_lookup_bytes(sizes)
    with jax.set_mesh(mesh):
        tables = count_sent(mesh, "tables")
        columns = count_sent(mesh, "columns")

    over_data = [key for key in columns if "data" in key[1]]
    assert [columns[key] for key in over_data] == [tables[key] for key in over_data]

    over_fsdp = {kind: size for (kind, axes), size in columns.items() if axes == ("fsdp",)}
    assert set(over_fsdp) == {"all-gather", "all-to-all"}
    assert over_fsdp["all-to-all"] + over_fsdp["all-gather"] / 2 == counted["columns"]
    assert over_fsdp["all-gather"] == 2 * (devices - 1) * tokens * 4

    table = {kind: size for (kind, axes), size in tables.items() if axes == ("fsdp",)}
    assert set(table) == {"all-gather", "reduce-scatter"}
    assert sum(table.values()) == counted["tables"]


@pytest.mark.parametrize("program", [0, 1])
def test_columns_travel_in_the_compute_dtype(program):
    mesh = make_mesh(dict(fsdp=4, tensor=2))
    with jax.set_mesh(mesh):
        given = lay_out(mesh, jnp.bfloat16)
        jaxpr = jax.make_jaxpr(make_programs(jnp.bfloat16, "columns")[program])(*given).jaxpr
    exchanges = [x for x in list_equations(jaxpr) if x.primitive.name == "all_to_all"]
    assert exchanges and {x.invars[0].aval.dtype.name for x in exchanges} == {"bfloat16"}


def test_auto_sends_fewer_bytes():
    """Large vocabularies go by columns. A few tokens more than twice a small one go by tables."""
    llama = config.LookupSizes(rows=128_256, width=4096, tokens=8192, devices=64, entry=2)
    assert config.choose_embed_lookup("auto", llama) == "columns"
    assert config.choose_embed_lookup("tables", llama) == "tables"

    letters = config.LookupSizes(rows=256, width=4096, tokens=500, devices=2, entry=2)
    assert config.choose_embed_lookup("auto", letters) == "columns"
    more = letters._replace(tokens=520)
    assert config.choose_embed_lookup("auto", more) == "tables"
    assert config.choose_embed_lookup("columns", more) == "columns"

    # The numbers of the tokens of many devices outweigh narrow columns.
    narrow = letters._replace(width=16, devices=64)
    assert config.choose_embed_lookup("auto", narrow) == "tables"


def test_decoding_over_context_gathers_tables():
    """Devices along context have the same tokens there, and the rows are those of the table."""
    mesh = make_mesh(dict(context=2, fsdp=4))
    with jax.set_mesh(mesh):
        table, _, _ = lay_out(mesh, jnp.float32)
        tokens = jax.device_put(TOKENS, NamedSharding(mesh, P(config.BATCH_AXES, None)))

        def look_up(table, tokens):
            with sharding.using_rules(sharding.WHOLE_ROWS):
                return lookup(table, tokens, jnp.float32, "columns")

        kinds = {x.primitive.name for x in list_equations(jax.make_jaxpr(look_up)(table, tokens))}
        rows = jax.jit(look_up)(table, tokens)
    assert "all_to_all" not in kinds and "all_gather" in kinds
    np.testing.assert_array_equal(np.asarray(rows), TABLE[TOKENS])
