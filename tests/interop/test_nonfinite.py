"""Weights that are NaN or infinite are named with their number, all in one line."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from drawn_models import LLAMA, assert_same, make_origin, read_all
from safetensors.numpy import load_file, save_file

import gpt_jax
from gpt_jax.commands.main import run_to_end
from gpt_jax.errors import UsageError
from gpt_jax.interop import describe_nonfinite, open_foreign, watch, write_directory
from gpt_jax.interop.finite import NAMED, count_nonfinite
from gpt_jax.run.convert import open_model, write_native
from gpt_jax.run.restore import load_model
from gpt_jax.run.resume import start_new

NAMES = {
    "native": {"blocks/0/mlp/up/kernel[1]": 3, "final_norm/scale": 1},
    "hf": {"model.layers.1.mlp.up_proj.weight": 3, "model.norm.weight": 1},
}


def spoil(origin):
    """Three entries of the second layer's kernel, and one of a norm, are no numbers."""
    whole = read_all(origin)
    whole["blocks/0/mlp/up/kernel"][1, 2, :3] = [np.nan, np.inf, -np.inf]
    whole["final_norm/scale"][5] = np.nan
    return origin._replace(read=lambda path, index: whole[path][index])


def write_both(folder: Path):
    origin = spoil(make_origin())
    write_directory(origin, folder / "hf", meet_nonfinite=print)
    write_native(origin, folder / "native", print, print)
    return origin


def convert(*given) -> tuple[int, str]:
    code, reason = run_to_end(["convert", *map(str, given)])
    return code, str(reason)


def test_entries_are_counted_whatever_the_layout(monkeypatch):
    monkeypatch.setattr("gpt_jax.interop.finite.BLOCK", 8)
    values = np.arange(60, dtype=np.float32).reshape(4, 15)
    values[1, 3] = values[3, 14] = np.nan
    values[2, 0] = -np.inf
    for view in (values, values.T, values[:, ::-1], values.astype(np.float16)):
        assert count_nonfinite(view) == 3
    assert count_nonfinite(values[0]) == count_nonfinite(np.zeros((0, 4))) == 0


@pytest.mark.parametrize("kind", NAMES)
def test_a_model_that_is_read_names_them(tmp_path, kind):
    write_both(tmp_path)
    origin, counts = watch(open_model(str(tmp_path / kind), 0, print, "bytes" * (kind == "hf")))
    read_all(origin)
    assert counts == NAMES[kind]


@pytest.mark.parametrize("kind", NAMES)
def test_a_conversion_refuses_them_and_leaves_nothing(tmp_path, kind, capsys):
    origin = write_both(tmp_path)
    given = ["--from", tmp_path / kind, f"--to={tmp_path / 'new'}"]
    given += ["--tokenizer=bytes"] if kind == "hf" else []
    code, reason = convert(*given)
    assert code == 2 and describe_nonfinite(NAMES[kind]) in reason
    assert "--allow_nonfinite" in reason and "\n" not in reason.strip()
    assert not [path for path in tmp_path.glob("new*/**/*") if path.is_file()]

    capsys.readouterr()
    assert convert(*given, "--allow_nonfinite")[0] == 0
    assert describe_nonfinite(NAMES[kind]) in capsys.readouterr().err
    again = open_model(str(tmp_path / "new"), 0, print, "" if kind == "hf" else "bytes")
    assert_same(read_all(again), read_all(origin))


def test_float16_has_infinity_too(tmp_path):
    write_directory(spoil(make_origin()), tmp_path / "hf", dtype="float16", meet_nonfinite=print)
    kernel = load_file(tmp_path / "hf/model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert np.isinf(kernel).sum() == 2 and np.isnan(kernel).sum() == 1


@pytest.mark.parametrize("kind", NAMES)
def test_inspecting_tells_them(tmp_path, kind, capsys):
    write_both(tmp_path)
    capsys.readouterr()
    assert run_to_end(["inspect", f"--checkpoint={tmp_path / kind}"])[0] == 0
    assert describe_nonfinite(NAMES[kind]) in capsys.readouterr().out.splitlines()
    assert run_to_end(["inspect", f"--checkpoint={tmp_path / kind}", "--json"])[0] == 0
    assert json.loads(capsys.readouterr().out)["nonfinite"] == NAMES[kind]


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("mesh", [{}, {"fsdp": 2, "data": 4}])
def test_no_run_starts_from_them(tmp_path, kind, mesh):
    """On devices a parameter counts as a whole, whoever keeps its parts."""
    write_both(tmp_path)
    values = {
        "init": {"from": str(tmp_path / kind), "model": "checkpoint"},
        "data": {"path": str(Path(__file__)), "tokenizer": "bytes"},
        "train": {"steps": 2, "seq_len": 16, "batch_size": 8},
        "eval": {"batch_size": 8},
        "mesh": mesh,
    }
    parts = gpt_jax.build(values, say=lambda line: None)
    with jax.set_mesh(parts.mesh), pytest.raises(UsageError) as error:
        start_new(parts, print)
    counts = {"blocks/0/mlp/up/kernel": 3, "final_norm/scale": 1}
    assert error.value.args[0].startswith(f"config.init.from: {describe_nonfinite(counts)} of ")


def test_who_asks_such_a_model_is_told(tmp_path):
    write_both(tmp_path)
    lines = []
    load_model(str(tmp_path / "native"), 0, lines.append)
    counts = {"blocks/0/mlp/up/kernel": 3, "final_norm/scale": 1}
    assert any(line.startswith(f"{describe_nonfinite(counts)} of ") for line in lines), lines


def test_the_table_twice_may_hold_nan(tmp_path):
    """A tied head that is its table once more is that with NaN as well."""
    origin = make_origin(LLAMA | dict(tied=True))
    whole = read_all(origin)
    whole["embed/table"][3] = np.nan
    origin = origin._replace(read=lambda path, index: whole[path][index])
    write_directory(origin, tmp_path / "hf", meet_nonfinite=print)

    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "hf/model.safetensors")
    assert_same(read_all(open_foreign(tmp_path / "hf")), whole)


def test_a_long_list_ends_with_what_is_left_out():
    line = describe_nonfinite({f"t{i}": 2 for i in range(NAMED + 5)})
    assert line.startswith(f"NaN or infinity in {NAMED + 5} tensors: t0 (2), t1 (2), t10 (2), ")
    assert line.endswith("and 5 more (10)")
    assert describe_nonfinite({}) == ""
