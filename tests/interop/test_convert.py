"""Models go from a directory of Hugging Face to a checkpoint and back, to the bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import tokenizers
from drawn_models import EXPERTS, LLAMA, NO_FAMILY, assert_same, make_origin, read_all
from safetensors.numpy import load_file, save_file

import gpt_jax
from gpt_jax import config, sharding
from gpt_jax.commands import convert as command
from gpt_jax.commands.main import run_to_end
from gpt_jax.errors import SaveFailed, UsageError
from gpt_jax.interop.export import write_directory
from gpt_jax.interop.origin import Origin
from gpt_jax.interop.weights import load_params
from gpt_jax.model import abstract_params
from gpt_jax.run.convert import average, make_config, open_model, write_native
from gpt_jax.run.resume import start_new
from gpt_jax.run.source import take_model
from gpt_jax.train.checkpoint import slices


@pytest.mark.parametrize("fields", [LLAMA, EXPERTS], ids=["llama", "mixtral"])
def test_a_round_trip_keeps_every_bit(tmp_path, fields):
    origin = make_origin(fields)
    write_directory(origin, tmp_path / "hf", shard_bytes=20_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1

    read = open_model(str(tmp_path / "hf"), 0, print, "bytes")
    assert_same(read_all(read), read_all(origin))
    write_native(read, tmp_path / "native", print)

    native = open_model(str(tmp_path / "native"), 0, print)
    assert_same(read_all(native), read_all(origin))
    write_directory(native, tmp_path / "again", shard_bytes=20_000)
    for file in (tmp_path / "hf").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_a_converted_checkpoint_is_one_of_ours(tmp_path):
    """It loads, its files are sealed, and it continues a prompt."""
    origin = make_origin()
    write_native(origin, tmp_path, print)

    loaded = gpt_jax.load(str(tmp_path))
    assert loaded.step == 0
    ours = {
        sharding.join_path(keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(loaded.params)
    }
    assert_same(ours, read_all(origin))
    assert len(gpt_jax.generate(loaded, "once", max_new_tokens=3)) == 1


def test_shards_are_read_one_by_one(tmp_path):
    """On a mesh no device reads more of a parameter than it keeps."""
    origin = make_origin()
    sizes = {}

    def read(path, index):
        values = origin.read(path, index)
        sizes[path] = max(sizes.get(path, 0), values.size)
        return values

    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    with jax.set_mesh(mesh):
        abstract = sharding.make_concrete(abstract_params(origin.model), mesh)
    params = load_params(read, abstract)

    kernel = params["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert sizes["blocks/0/mlp/up/kernel"] == kernel.size // 4
    np.testing.assert_array_equal(kernel, read_all(origin)["blocks/0/mlp/up/kernel"])


def test_the_mean_of_several(tmp_path):
    for seed in (1, 2):
        write_native(make_origin(seed=seed), tmp_path / str(seed), print)
    sources = [str(tmp_path / "1"), str(tmp_path / "2")]
    given = ["--from", *sources, "--weights", "3", "1", f"--to={tmp_path / 'mean'}"]
    command.convert(command.make_flags().parse_args([*given, "--format=native"]))

    mean = read_all(open_model(str(tmp_path / "mean"), 0, print))
    first, second = (read_all(make_origin(seed=seed)) for seed in (1, 2))
    for path, values in mean.items():
        np.testing.assert_allclose(values, 0.75 * first[path] + 0.25 * second[path], atol=1e-7)


def test_files_beside_the_weights_are_carried(tmp_path):
    carried = {"generation_config.json": b'{"a": 1}\n', "chat_template.jinja": "模板".encode()}
    origin = make_origin()._replace(carried=carried)
    write_native(origin, tmp_path / "native", print)
    write_directory(open_model(str(tmp_path / "native"), 0, print), tmp_path / "hf")
    for name, content in carried.items():
        assert (tmp_path / "hf" / name).read_bytes() == content


def test_tensors_in_sixteen_bits(tmp_path):
    origin = make_origin()
    write_directory(origin, tmp_path / "hf", dtype="bfloat16")
    table = load_file(tmp_path / "hf/model.safetensors")["model.embed_tokens.weight"]
    assert table.dtype.name == "bfloat16"
    ours = open_model(str(tmp_path / "hf"), 0, print, "bytes").read(
        "embed/table", (slice(None), slice(None))
    )
    np.testing.assert_array_equal(ours, table.astype(np.float32))
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_padding_rows_are_named(tmp_path):
    lines = []
    write_native(make_origin(), tmp_path, lines.append)
    assert lines == ["the embedding has 260 rows for 257 tokens: rows 257 to 259 are padding"]


BAD = {
    "no tokenizer": (
        lambda origin, path: write_native(origin._replace(tokenizer=None), path, print),
        "--tokenizer=SPEC",
    ),
    "more tokens than rows": (
        lambda origin, path: write_native(make_origin(LLAMA | dict(vocab=100)), path, print),
        "has 257 tokens, and the embedding 100 rows",
    ),
    "no family": (
        lambda origin, path: write_directory(
            make_origin(LLAMA | dict(residual_scalars=True)), path
        ),
        "no family of models fits this one; nearest is llama, which cannot say:\n"
        "  config.model.residual_scalars = True",
    ),
    "another family": (
        lambda origin, path: write_directory(origin, path, family="gpt2"),
        "the family gpt2 does not fit this model; it cannot say:\n"
        "  no value of activation_function stands for this model",
    ),
    "unknown family": (
        lambda origin, path: write_directory(origin, path, family="bert"),
        "'bert' is not known; known: gpt2, ",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_converted_is_refused(tmp_path, name):
    act, text = BAD[name]
    with pytest.raises(UsageError) as error:
        act(make_origin(), tmp_path / "new")
    assert text in "\n".join(error.value.args)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_touched(tmp_path):
    origin = make_origin()
    for write in (
        lambda: write_directory(origin, tmp_path / "hf"),
        lambda: write_native(origin, tmp_path / "native", print),
    ):
        write()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UsageError, match="already; name a new directory"):
            write()
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        assert before == after


def test_a_write_that_fails_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slices, "_make_array", fail)
    with pytest.raises(SaveFailed, match="No space left"):
        write_native(make_origin(), tmp_path, print)
    with pytest.raises(UsageError, match="nothing finished there yet"):
        open_model(str(tmp_path), 0, print)

    monkeypatch.undo()
    write_native(make_origin(), tmp_path, print)
    assert_same(read_all(open_model(str(tmp_path), 0, print)), read_all(make_origin()))


def test_the_command(tmp_path, capsys):
    write_directory(make_origin(), tmp_path / "hf")
    given = ["convert", "--from", str(tmp_path / "hf"), f"--to={tmp_path / 'n'}"]
    code, reason = run_to_end(given)
    assert code == 2 and "--tokenizer=SPEC" in str(reason)

    code, _ = run_to_end([*given, "--tokenizer=bytes"])
    assert code == 0 and Path(tmp_path / "n/checkpoints/0").is_dir()
    code, reason = run_to_end([*given, "--weights", "1", "2"])
    assert code == 2 and "2 shares for 1 models" in str(reason)


# ---- used where they lie -------------------------------------------------------------------------


def write_foreign(path: Path, fields=LLAMA) -> Origin:
    """A directory with the byte tokenizer's ids in a tokenizer.json."""
    origin = make_origin(fields, tokenizer=make_tokenizer(path))
    write_directory(origin, path / "hf")
    return origin


def make_tokenizer(path: Path) -> str:
    """A byte-level tokenizer.json of 257 tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(path / "tokenizer.json"))
    return str(path / "tokenizer.json")


def test_a_directory_is_loaded_without_conversion(tmp_path):
    origin = write_foreign(tmp_path)
    lines = []
    loaded = gpt_jax.load(str(tmp_path / "hf"), devices=2, say=lines.append)
    ours = {
        sharding.join_path(keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(loaded.params)
    }
    assert_same(ours, read_all(origin))
    assert "a llama, on 2 cpu devices" in lines[-1]
    assert loaded.tokenizer.fingerprint == origin.tokenizer.fingerprint


@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_a_run_starts_from_a_directory(tmp_path, mesh):
    """Its model is that of the directory, and its first loss that of the weights there."""
    origin = write_foreign(tmp_path)
    overrides = {
        "init": {"from": str(tmp_path / "hf"), "model": "checkpoint"},
        "model": {"dropout": 0.1, "embed": 32},
        "mesh": mesh,
        "data": {"path": str(Path(__file__))},
        "train": {"steps": 2, "seq_len": 16, "batch_size": 8},
        "eval": {"batch_size": 8},
    }
    lines = []
    parts = gpt_jax.build(overrides, say=lines.append)
    assert lines[0].endswith("set aside of config.model: embed = 32")
    assert parts.config.model.dropout == 0.1
    assert replace(parts.config.model, dropout=0.0) == origin.model

    start = start_new(parts, print)
    state = {
        sharding.join_path(keys): np.asarray(leaf)
        for keys, leaf in jax.tree_util.tree_leaves_with_path(start.state.params)
    }
    assert_same(state, read_all(origin))
    [entry] = start.lineage
    assert entry["from"] == str(tmp_path / "hf") and entry["data"] == "a llama"


REFUSED = {
    "moments": (
        {"init": {"optimizer": True}},
        "config.init.optimizer = True: .* has no moments; leave it out",
    ),
    "averaged": ({"init": {"averaged": True}}, "keeps no averaged weights; leave it out"),
    "no path": ({"init": {"from": ""}}, "config.init.model = 'checkpoint': needs config.init.from"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_start_that_cannot_be_is_refused(tmp_path, name):
    write_foreign(tmp_path)
    more, text = REFUSED[name]
    values = {
        "init": {"from": str(tmp_path / "hf"), "model": "checkpoint"} | more.get("init", {}),
        "model": more.get("model", {}),
        "data": {"path": str(Path(__file__))},
        "train": {"steps": 2, "seq_len": 16, "batch_size": 8},
        "eval": {"batch_size": 8},
    }
    with pytest.raises(UsageError, match=text):
        start_new(gpt_jax.build(values, say=lambda line: None), print)


def test_a_run_exports_its_last_checkpoint(tmp_path):
    """The directory has the weights of the checkpoint, and a second start makes it again."""
    fields = {f"--config.model.{name}={value}" for name, value in LLAMA.items()}
    given = [*fields, "--config.checkpoint.export=hf", "--config.train.steps=2"]
    parts = runs.build(runs.load(tmp_path, *given))
    runs.run(parts, tmp_path / "run")

    native = read_all(open_model(str(tmp_path / "run"), 2, print))
    assert_same(read_all(open_model(str(tmp_path / "run/hf/2"), 0, print, "bytes")), native)

    shutil.rmtree(tmp_path / "run/hf")
    runs.run(parts, tmp_path / "run")
    assert (tmp_path / "run/hf/2/config.json").exists()


def test_a_run_that_no_family_has_is_not_started(tmp_path):
    model = NO_FAMILY | {"vocab": 0, "max_seq": 256}
    values = {"model": model, "checkpoint": {"export": "hf"}, "train": {"batch_size": 8}}
    with pytest.raises(UsageError, match="no family of models"):
        gpt_jax.build(values, say=lambda line: None)


@pytest.mark.parametrize("name", ["p%20q", "a#b", "a?b", "空 格"])
def test_any_path_is_a_path(tmp_path, name):
    """tensorstore reads % and # of a URL in its own way."""
    origin = make_origin()
    write_native(origin, tmp_path / name, print)
    assert_same(read_all(open_model(str(tmp_path / name), 0, print)), read_all(origin))
    loaded = gpt_jax.load(str(tmp_path / name), devices=1, say=lambda line: None)
    np.testing.assert_array_equal(loaded.params["embed"]["table"], read_all(origin)["embed/table"])


def test_an_export_that_ends_in_any_way_leaves_nothing(tmp_path):
    origin = make_origin()

    def read(path, index):
        return origin.read(path, index) * (1e6 if path == "final_norm/scale" else 1)

    with pytest.raises(UsageError, match="entries beyond its range"):
        write_directory(origin._replace(read=read), tmp_path / "hf", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_the_table_once_more_is_dropped(tmp_path):
    tied = make_origin(LLAMA | dict(tied=True))
    write_directory(make_origin(), tmp_path / "hf")
    tensors = load_file(tmp_path / "hf/model.safetensors")
    values = json.loads((tmp_path / "hf/config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "hf/config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"lm_head.weight is not model.embed_tokens.weight"):
        open_model(str(tmp_path / "hf"), 0, print, "bytes")

    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    assert_same(read_all(open_model(str(tmp_path / "hf"), 0, print, "bytes")), read_all(tied))


def test_models_that_mean_something_else_are_not_averaged(tmp_path):
    first = make_origin()
    for other in (make_origin(LLAMA | dict(rope_base=500.0)), make_origin(tokenizer="bytes+chat")):
        with pytest.raises(UsageError, match=r"other (models|tokenizers)"):
            average([first, other], [0.5, 0.5])
    average([first, make_origin(LLAMA | dict(dropout=0.1))], [0.5, 0.5])


def test_a_directory_has_no_steps(tmp_path):
    write_directory(make_origin(), tmp_path / "hf")
    with pytest.raises(UsageError, match="has no steps; leave it out"):
        open_model(str(tmp_path / "hf"), 7, print)
    with pytest.raises(UsageError, match="gpt-jax convert --from"):
        gpt_jax.load(str(tmp_path / "hf"), say=lambda line: None)


def test_a_run_that_has_saved_nothing_is_no_foreign_model(tmp_path):
    values = config.to_dict(make_config(make_origin().model))
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match="holds no checkpoints"):
        open_model(str(tmp_path), 0, print)


def test_a_run_that_was_killed_in_its_first_save_starts_again(tmp_path):
    write_foreign(tmp_path)
    workdir = tmp_path / "run"
    (workdir / "checkpoints/2").mkdir(parents=True)
    (workdir / "checkpoints/2.saving").touch()
    init = config.Init(from_=str(tmp_path / "hf"), model="checkpoint")
    assert take_model(config.Config(init=init), workdir).model.embed == LLAMA["embed"]
