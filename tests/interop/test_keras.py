"""The weights that Keras 3 has of the model of configs/guide.py are read to the bit."""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from drawn_models import LLAMA, assert_same, make_origin, read_all

from gpt_jax import config, sharding
from gpt_jax.errors import UsageError
from gpt_jax.infer import compute_logits
from gpt_jax.interop import load_params, open_foreign, write_directory
from gpt_jax.model import abstract_params
from gpt_jax.run.convert import open_model, write_native

GUIDE = dict(
    layers=12,  # block_10 comes after block_9
    embed=16,
    heads=4,
    mlp=24,
    vocab=260,
    max_seq=32,
    pattern=(("attention", "relu"),),
    norm="layernorm",
    norm_position="post",
    norm_epsilon=1e-6,
    final_norm=False,
    position="learned",
    tied=False,
)
LAYER_PARTS = {
    "att/query_dense": ("attention/q", (16, 4, 4), (4, 4)),
    "att/key_dense": ("attention/k", (16, 4, 4), (4, 4)),
    "att/value_dense": ("attention/v", (16, 4, 4), (4, 4)),
    "att/output_dense": ("attention/out", (4, 4, 16), (16,)),
    "ffn/layers/dense": ("mlp/up", None, None),
    "ffn/layers/dense_1": ("mlp/down", None, None),
    "ln1": ("mixer_norm", None, None),
    "ln2": ("mlp_norm", None, None),
}


def write_keras(path: Path, fields=GUIDE, more=()):
    """Writes a drawn model in the layout of Keras, and returns it. `more` are further arrays."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed; it is the extra keras")
    origin = make_origin(fields)
    ours = read_all(origin)
    arrays = {
        "emb/token_emb/vars/0": ours["embed/table"],
        "emb/pos_emb/vars/0": ours["position/table"],
        "dense/vars/0": ours["head/kernel"],
    }
    for layer in range(fields["layers"]):
        block = f"block_{layer}" if layer else "block"
        for part, (path_of, *shapes) in LAYER_PARTS.items():
            names = ("scale", "bias") if part.startswith("ln") else ("kernel", "bias")
            for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
                values = ours[f"blocks/0/{path_of}/{name}"][layer]
                stored = values if shape is None else values.reshape(shape)
                arrays[f"{block}/{part}/vars/{number}"] = stored
    with h5py.File(path, "w") as file:
        for name, values in (arrays | dict(more)).items():
            file[f"layers/{name}"] = values
        file["optimizer/vars/0"] = np.zeros(3)
    return origin


@pytest.mark.parametrize("mlp", [24, 16], ids=["tall", "square"])
def test_every_array_has_its_place(tmp_path, mlp):
    origin = write_keras(tmp_path / "a.weights.h5", GUIDE | dict(mlp=mlp))
    read = open_model(str(tmp_path / "a.weights.h5"), 0, print, "bytes")
    assert read.model == origin.model
    assert_same(read_all(read), read_all(origin))
    write_native(read, tmp_path / "native", print)
    assert_same(read_all(open_model(str(tmp_path / "native"), 0, print)), read_all(origin))


BAD = {
    "a bias of the head": (
        {"dense/vars/1": np.ones(260, np.float32)},
        "dense has a bias, which no model here has; make that layer with use_bias=False",
    ),
    "a third norm": (
        {"block/ln3/vars/0": np.ones(16, np.float32), "block/ln3/vars/1": np.ones(16)},
        "2 maps and 3 norms of 5 layers; the guide's block has 2 and 2",
    ),
    "a second head": (
        {"dense_1/vars/0": np.ones((16, 3), np.float32)},
        "dense, dense_1, emb/pos_emb, emb/token_emb are not an embedding, positions and a head",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_another_model_is_refused(tmp_path, case):
    more, text = BAD[case]
    write_keras(tmp_path / "a.weights.h5", more=more)
    with pytest.raises(UsageError) as error:
        open_foreign(tmp_path / "a.weights.h5")
    assert text in error.value.args[0]


def test_a_bias_of_zeros_is_none(tmp_path):
    path = tmp_path / "a.weights.h5"
    origin = write_keras(path, more={"dense/vars/1": np.zeros(260, np.float32)})
    assert_same(read_all(open_foreign(path)), read_all(origin))


@pytest.mark.parametrize("content", [b"", b"no HDF5" * 99])
def test_a_file_of_another_kind(tmp_path, content):
    pytest.importorskip("h5py", reason="h5py is not installed; it is the extra keras")
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(UsageError, match="is no file of HDF5"):
        open_foreign(tmp_path / "a.h5")


def test_without_h5py_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").touch()
    with pytest.raises(UsageError, match=r"pip install 'gpt_jax\[keras\]'"):
        open_foreign(tmp_path / "a.h5")


def test_the_family_is_only_read(tmp_path):
    with pytest.raises(UsageError, match="can only be read"):
        write_directory(make_origin(LLAMA), tmp_path / "hf", family="guide")


def test_logits_are_those_of_keras():
    """The files of tests/support/make_keras_guide.py, in the folder that GUIDE_KERAS names."""
    folder = os.environ.get("GUIDE_KERAS")
    if not folder:
        pytest.skip("GUIDE_KERAS names no folder with the files of make_keras_guide.py")
    saved = np.load(Path(folder) / "guide.npz")
    origin = open_foreign(Path(folder) / "guide.weights.h5")
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    with jax.set_mesh(mesh):
        abstract = sharding.make_concrete(abstract_params(origin.model), mesh)
        params = load_params(origin.read, abstract)
        compute = config.Compute(dtype="float32", kernel="auto")
        logits = compute_logits(origin.model, compute, params, saved["ids"], print)
    np.testing.assert_allclose(logits, saved["logits"], atol=2e-5)
