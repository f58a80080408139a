"""Weights of llama2.c and nanoGPT: what their files hold, and what they may not do.

The real ones are read where the folder of data lies beside the checkout.
"""

import json
import lzma
import pickle
import struct
import zipfile
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest

import gpt_jax
from gpt_jax.data.tokenizers.llama2c import read_llama2c
from gpt_jax.errors import UsageError
from gpt_jax.interop import open_foreign
from gpt_jax.interop.nanogpt import open_nanogpt
from gpt_jax.interop.torch_file import read_torch_file
from gpt_jax.run.convert import write_native

WEIGHTS = Path(__file__).resolve().parents[3] / "shared/data/weights"
needs_weights = pytest.mark.skipif(
    not WEIGHTS.is_dir(), reason="the trained weights of others are not part of the repository"
)


# ---- llama2.c ------------------------------------------------------------------------------------

SIZES = dict(dim=8, hidden=12, layers=2, heads=2, kv_heads=1, vocab=20, seq=16)


def draw_parts(sizes, is_tied=True) -> dict[str, np.ndarray]:
    """The tensors of a llama2.c file by its own names, all layers of a part in one array."""
    rng = np.random.default_rng(0)
    D, F, L, V = sizes["dim"], sizes["hidden"], sizes["layers"], sizes["vocab"]
    K = D // sizes["heads"] * sizes["kv_heads"]
    shapes = {
        "table": (V, D),
        "attention_norm": (L, D),
        "wq": (L, D, D),
        "wk": (L, K, D),
        "wv": (L, K, D),
        "wo": (L, D, D),
        "ffn_norm": (L, D),
        "w1": (L, F, D),
        "w2": (L, D, F),
        "w3": (L, F, D),
        "norm": (D,),
        "angles": (sizes["seq"], D // sizes["heads"]),
    }
    if not is_tied:
        shapes["head"] = (V, D)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_file(path: Path, parts, sizes, version=0, is_tied=True) -> Path:
    if version:
        order = [
            "attention_norm",
            "ffn_norm",
            "norm",
            "table",
            "wq",
            "wk",
            "wv",
            "wo",
            "w1",
            "w2",
            "w3",
            "head",
        ]
        head = struct.pack("<Ii7iB", 0x616B3432, version, *sizes.values(), is_tied).ljust(
            256, b"\0"
        )
    else:
        order = list(parts)
        sizes = sizes | dict(vocab=sizes["vocab"] if is_tied else -sizes["vocab"])
        head = struct.pack("<7i", *sizes.values())
    path.write_bytes(head + b"".join(parts[name].tobytes() for name in order if name in parts))
    return path


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("is_tied", [True, False])
def test_each_layout_of_llama2c(tmp_path, version, is_tied):
    parts = draw_parts(SIZES, is_tied)
    origin = open_foreign(write_file(tmp_path / "m.bin", parts, SIZES, version, is_tied))
    assert origin.model.tied == is_tied and origin.model.max_seq == 16

    def read(path, *index):
        return origin.read(path, tuple(slice(0, size) for size in origin.shapes[path]))

    np.testing.assert_array_equal(read("embed/table"), parts["table"])
    np.testing.assert_array_equal(read("blocks/0/mlp/gate/kernel"), parts["w1"].swapaxes(1, 2))
    # Channels 0 and 1 turn together there, and channels 0 and 2 of four here.
    head = parts["wk"][1].reshape(1, 4, 8)
    np.testing.assert_array_equal(
        read("blocks/0/attention/k/kernel")[1], head[:, [0, 2, 1, 3]].reshape(4, 8).T
    )
    if not is_tied:
        np.testing.assert_array_equal(read("head/kernel"), parts["head"].T)


BAD_FILES = {
    "short": (lambda path: path.write_bytes(b"abc"), "is no file of llama2.c: it has 3 bytes"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-4]), "its header says"),
    "quantised": (
        lambda path: path.write_bytes(struct.pack("<Ii", 0x616B3432, 2).ljust(300, b"\0")),
        "is version 2 of llama2.c; export version 0 or 1",
    ),
    "hostile": (
        lambda path: path.write_bytes(struct.pack("<7i", 2**31 - 1, 1, 1, 1, 1, 1, 1)),
        "its header says",
    ),
    "negative": (
        lambda path: path.write_bytes(struct.pack("<7i", -8, 1, 1, 1, 1, 1, 1)),
        "is no file of llama2.c",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_another_file_of_that_name_is_refused(tmp_path, name):
    path = write_file(tmp_path / "m.bin", draw_parts(SIZES), SIZES)
    damage, text = BAD_FILES[name]
    damage(path)
    with pytest.raises(UsageError, match=text):
        open_foreign(path)


@needs_weights
def test_a_trained_llama_tells_its_story(tmp_path):
    """Greedy text from the begin token, and the mean loss of it, as llama2.c has them."""
    wanted = json.loads((WEIGHTS / "stories260K_expected.json").read_text())
    path = tmp_path / "stories.bin"
    path.write_bytes(lzma.open(WEIGHTS / "stories260K.bin.xz").read())
    write_native(open_foreign(path, (), str(WEIGHTS / "tok512.bin")), tmp_path / "run", print)

    loaded = gpt_jax.load(str(tmp_path / "run"), devices=1)
    assert [1, *loaded.tokenizer.encode(wanted["text"])] == wanted["ids"]
    count = len(wanted["ids"]) - 1
    story = gpt_jax.generate(loaded, "", temperature=0.0, max_new_tokens=count)
    assert story == [wanted["text"]]

    from gpt_jax.model import Transformer

    module = Transformer(loaded.config.model, loaded.config.compute)
    tokens = np.array([wanted["ids"]], np.int32)
    with jax.set_mesh(loaded.mesh):
        logits = jax.jit(lambda p, t: module.apply({"params": p}, {"tokens": t}))(
            loaded.params, tokens[:, :-1]
        )
    logits = np.asarray(logits[0], np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(count), tokens[0, 1:]]
    assert float(losses.mean()) == pytest.approx(wanted["mean_nll"], abs=1e-5)


def test_a_tokenizer_of_llama2c(tmp_path):
    """Pieces are merged by score, unknown characters become bytes, and text comes back."""
    pieces = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]
    pieces += [(0.0, f"<0x{byte:02X}>".encode()) for byte in range(256)]
    pieces += [(-0.0, b"ab"), (-1.0, b"bc"), (-2.0, b"abc")]
    pieces += [(-10.0 - i, piece.encode()) for i, piece in enumerate(" abc")]
    raw = struct.pack("<i", 6)
    raw += b"".join(struct.pack("<fi", score, len(piece)) + piece for score, piece in pieces)
    path = tmp_path / "tok.bin"
    path.write_bytes(raw)

    tokenizer = read_llama2c(path)
    space, ab, bc, abc = (262, 259, 260, 261)
    assert tokenizer.encode("abc").tolist() == [space, abc]
    assert tokenizer.encode("bcab").tolist() == [space, bc, ab]
    assert tokenizer.encode("é").tolist() == [space, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("aé b")) == "aé b"
    assert tokenizer.eot == 1

    path.write_bytes(raw[:50])
    with pytest.raises(UsageError, match="is no tokenizer of llama2"):
        read_llama2c(path)


# ---- nanoGPT -------------------------------------------------------------------------------------


class Storage:
    """Stands for a storage while a file is pickled as torch does it."""

    def __init__(self, key: str, count: int):
        self.key, self.count = key, count


class Tensor:
    """Pickles as torch pickles a tensor."""

    def __init__(self, storage, offset, shape, strides):
        self.parts = (storage, offset, shape, strides, False, {})

    def __reduce__(self):
        return Global("torch._utils", "_rebuild_tensor_v2"), self.parts


class Global:
    """A function that is pickled by its name alone."""

    def __init__(self, module: str, name: str):
        self.module, self.name = module, name

    def __call__(self, *args):
        raise AssertionError("only its name is wanted")


class Pickler(pickle._Pickler):
    """Writes Global and Storage as torch's pickler does."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def persistent_id(self, value):
        if isinstance(value, Storage):
            return ("storage", Global("torch", "FloatStorage"), value.key, "cpu", value.count)
        return None

    def save_name(self, value):
        self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())

    dispatch[Global] = save_name


def save_as_torch(path: Path, saved, storages: dict[str, np.ndarray]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("ckpt/data.pkl", "w") as stream:
            Pickler(stream, protocol=2).dump(saved)
        for key, values in storages.items():
            archive.writestr(f"ckpt/data/{key}", values.tobytes())
    return path


def test_tensors_share_storages_and_have_strides(tmp_path):
    values = np.arange(12, dtype=np.float32)
    storage = Storage("0", 12)
    saved = {
        "whole": Tensor(storage, 0, (3, 4), (4, 1)),
        "turned": Tensor(storage, 0, (4, 3), (1, 4)),
        "part": Tensor(storage, 5, (2,), (2,)),
    }
    read = read_torch_file(save_as_torch(tmp_path / "a.pt", saved, {"0": values}))
    np.testing.assert_array_equal(read["whole"].read(), values.reshape(3, 4))
    np.testing.assert_array_equal(read["turned"].read(), values.reshape(3, 4).T)
    np.testing.assert_array_equal(read["part"].read(), [5, 7])


HOSTILE = {
    "runs code": (Global("posix", "system"), "names posix.system, which is not run"),
    "beyond its storage": (
        {"a": Tensor(Storage("0", 4), 2, (2, 2), (2, 1))},
        "a tensor beyond its storage",
    ),
    "no dict": ([1, 2], "holds a list, and a dict is needed"),
    "no nanoGPT": ({"weights": {}}, "is no checkpoint of nanoGPT"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path, name):
    saved, text = HOSTILE[name]
    path = save_as_torch(tmp_path / "a.pt", saved, {"0": np.zeros(4, np.float32)})
    with pytest.raises(UsageError, match=text):
        open_nanogpt(path)


def test_a_file_that_is_no_zip_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK no zip at all")
    with pytest.raises(UsageError, match="is no file of tensors alone"):
        open_foreign(tmp_path / "a.pt")


def test_a_checkpoint_of_nanogpt(tmp_path):
    """Its matrices are (out, in), its q, k and v one of them, and its head is the embedding."""
    rng = np.random.default_rng(0)
    D = 8
    shapes = {
        "wte.weight": (16, D),
        "wpe.weight": (4, D),
        "h.0.ln_1.weight": (D,),
        "h.0.ln_2.weight": (D,),
        "h.0.attn.c_attn.weight": (3 * D, D),
        "h.0.attn.c_proj.weight": (D, D),
        "h.0.mlp.c_fc.weight": (4 * D, D),
        "h.0.mlp.c_proj.weight": (D, 4 * D),
        "ln_f.weight": (D,),
    }
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    state = {
        f"_orig_mod.transformer.{name}": Tensor(
            Storage(name, values.size),
            0,
            values.shape,
            tuple(stride // 4 for stride in values.strides),
        )
        for name, values in arrays.items()
    }
    state["_orig_mod.lm_head.weight"] = state["_orig_mod.transformer.wte.weight"]
    settings = dict(
        n_layer=1, n_head=2, n_embd=D, block_size=4, bias=False, vocab_size=16, dropout=0.0
    )
    saved = {"model": state, "model_args": settings, "iter_num": 3}
    origin = open_foreign(save_as_torch(tmp_path / "ckpt.pt", saved, arrays))

    assert origin.model.tied and not origin.model.bias and origin.model.max_seq == 4
    for i, name in enumerate("qkv"):
        path = f"blocks/0/attention/{name}/kernel"
        ours = origin.read(path, tuple(map(slice, origin.shapes[path])))[0]
        np.testing.assert_array_equal(ours, arrays["h.0.attn.c_attn.weight"][i * D : (i + 1) * D].T)


@needs_weights
def test_a_file_of_torch_itself():
    _, tensors = open_nanogpt(WEIGHTS / "nanogpt_tiny_ckpt.pt")
    with np.load(WEIGHTS / "nanogpt_tiny_gold.npz") as wanted:
        for name in wanted.files:
            short = name.removeprefix("_orig_mod.")
            if short == "lm_head.weight":
                continue
            found = tensors[short].read().astype(wanted[name].dtype)
            np.testing.assert_array_equal(found, wanted[name], err_msg=name)
