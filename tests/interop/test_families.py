"""Each family against transformers: logits, gradients, greedy text, and its tensors bit for bit.

The goldens are made by tests/support/make_goldens.py. Shapes: B batch, T sequence, V vocab.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import GOLDENS, NAMES, read_config

from gpt_jax import config
from gpt_jax.data.tokenizers.vocabulary import make_char_tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.infer.decode import generate
from gpt_jax.infer.settings import Sampling
from gpt_jax.interop.architecture import write_config
from gpt_jax.interop.families import FAMILIES, find_family
from gpt_jax.interop.foreign import open_foreign
from gpt_jax.interop.origin import Origin
from gpt_jax.interop.tensors import list_tensors
from gpt_jax.interop.weights import join_piece, make_plan
from gpt_jax.model.transformer import Transformer, abstract_params
from gpt_jax.sharding.mesh import join_path

REFERENCE = config.Compute(kernel="reference")
ROUGH = config.Compute(kernel="reference", dtype="bfloat16")
# A character for each id of the goldens.
LETTERS = make_char_tokenizer("".join(chr(ord("A") + i) for i in range(48)))


@cache
def open_golden(name: str) -> Origin:
    return open_foreign(GOLDENS / name)


@cache
def read_golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / name / "golden.npz") as file:
        return dict(file)


@cache
def read_params(name: str):
    origin = open_golden(name)

    def read(keys, leaf):
        return origin.read(join_path(keys), tuple(map(slice, leaf.shape)))

    return jax.tree_util.tree_map_with_path(read, abstract_params(origin.model))


@cache
def compute(name: str):
    """(logits, gradients, logits in bfloat16) of the golden's ids, in one compiled program."""
    model = open_golden(name).model

    def apply(params, ids, how):
        return Transformer(model, how).apply({"params": params}, {"tokens": ids})

    def loss(params, ids):
        logits = apply(params, ids, REFERENCE)
        logs = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(logs, ids[:, 1:, None], -1).mean(), logits

    @jax.jit
    def run(params, ids):
        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params, ids)
        return logits, gradients, apply(params, ids, ROUGH)

    return jax.tree.map(np.asarray, run(read_params(name), read_golden(name)["ids"]))


def to_foreign(name: str, tree) -> dict[str, np.ndarray]:
    """A tree like the parameters, as tensors with the names and shapes of the file."""
    origin = open_golden(name)
    leaves = {join_path(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}
    plan = make_plan(find_family(origin.family), origin.model)

    def read(path, index):
        return leaves[path][index]

    return {piece.name: join_piece(plan, piece, read) for piece in plan.pieces}


def close(ours, theirs, rel=1e-5, floor=0.0):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * max(np.abs(theirs).max(), floor))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal(name):
    close(compute(name)[0], read_golden(name)["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal(name):
    """Our gradient of each tensor of the file is theirs."""
    golden = read_golden(name)
    theirs = {key[len("grad/") :]: x for key, x in golden.items() if key.startswith("grad/")}
    ours = to_foreign(name, compute(name)[1])
    assert ours.keys() == theirs.keys()
    # The gradient of a bias on keys is zero but for rounding, so small leaves have a floor.
    floor = 1e-2 * max(np.abs(x).max() for x in theirs.values())
    for key, gradient in theirs.items():
        assert ours[key].shape == gradient.shape
        close(ours[key], gradient, floor=floor)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_those_of_the_file(name):
    """Parameters become the tensors that they were read from, to the bit."""
    ours = to_foreign(name, read_params(name))
    file = list_tensors(GOLDENS / name)
    assert ours.keys() == file.keys()
    for key, tensor in file.items():
        theirs = tensor.read()
        assert ours[key].dtype == theirs.dtype == np.float32
        np.testing.assert_array_equal(ours[key].view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("name", NAMES)
def test_greedy_text_is_equal(name):
    """Fifty tokens through the KV cache are those of transformers."""
    golden = read_golden(name)
    prompt = LETTERS.decode(golden["prompt"])
    wanted = len(golden["greedy"])
    sampling = Sampling(max_new_tokens=wanted, temperature=0.0)
    [done] = generate(
        open_golden(name).model, REFERENCE, read_params(name), LETTERS, [prompt], sampling, print
    )
    assert wanted == 50
    assert done.tokens == tuple(golden["greedy"].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_has_the_same_top_token(name):
    """Wherever the best two logits are further apart than bfloat16 resolves.

    Its numbers are at most 2^-7 of their value apart. Weights and stream are both rounded, so two
    such steps of the largest logit count as resolved. The worst wrong token of all goldens was of
    logits that are 0.5 steps apart.
    """
    logits = read_golden(name)["logits"]
    rough = compute(name)[2]
    second, best = np.moveaxis(np.sort(logits, -1)[..., -2:], -1, 0)
    is_clear = best - second > 2 * 2**-7 * np.abs(logits).max()
    assert is_clear.mean() > 0.5 and (rough != logits).any()
    assert (rough.argmax(-1) == logits.argmax(-1))[is_clear].mean() >= 0.99


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_written_as_it_was_read(name):
    """Each key that we write and that their file has too has the same value, and the same type."""
    theirs = read_config(name)
    ours = write_config(open_golden(name).model, theirs["model_type"])
    shared = ours.keys() & {key for key, value in theirs.items() if value is not None}
    assert len(shared) >= 10
    assert {key: repr(ours[key]) for key in shared} == {key: repr(theirs[key]) for key in shared}


def test_a_scale_that_is_no_whole_number_there_is_refused():
    model = replace(open_golden("gemma3").model, attention_scale=0.3)
    with pytest.raises(UsageError, match=r"attention_scale = 0\.3: .* whole number"):
        write_config(model, "gemma3_text")


def test_every_family_has_a_golden():
    kinds = {read_config(name)["model_type"] for name in NAMES}
    assert kinds == {name for name, family in FAMILIES.items() if family.is_written}
