"""A model keeps where it came from, and the files that came with it, through runs of ours."""

import hashlib
import json
from pathlib import Path

from drawn_models import make_origin
from test_begin import save_tokenizer

import gpt_jax
from gpt_jax.commands.main import run_to_end
from gpt_jax.interop import write_directory
from gpt_jax.run import describe_entry, run_training
from gpt_jax.train import read_meta, resolve_checkpoint

FILES = {
    "generation_config.json": b'{"eos_token_id": [257, 97],\n "temperature": 0.6}\n',
    "chat_template.jinja": "{{ 模板 }}\n".encode(),
    "special_tokens_map.json": b'{"eos_token": "</s>"}',
}


def write_foreign(folder: Path) -> Path:
    """A directory of Hugging Face with files beside its weights."""
    origin = make_origin(tokenizer=save_tokenizer(folder, ""))
    write_directory(origin, folder / "hf")
    for name, content in FILES.items():
        (folder / "hf" / name).write_bytes(content)
    return folder / "hf"


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def train(source: Path | str, workdir: Path, steps: int = 2, **data) -> list[str]:
    """Trains from `source`, exports the last step, and returns what was said."""
    lines: list[str] = []
    values = {
        "init": {"from": str(source), "model": "checkpoint"},
        "data": {"path": str(Path(__file__)), **data},
        "train": {"steps": steps, "seq_len": 16, "batch_size": 8},
        "eval": {"batch_size": 8, "samples": 0},
        "checkpoint": {"export": "hf"},
    }
    run_training(gpt_jax.build(values, say=lines.append), workdir, say=lines.append)
    return lines


def run(*given) -> None:
    code, reason = run_to_end([*map(str, given)])
    assert code == 0, reason


def test_a_converted_checkpoint_names_the_files_it_is_made_of(tmp_path, capsys):
    source = write_foreign(tmp_path)
    run("convert", "--from", source, f"--to={tmp_path / 'native'}")
    [entry] = read_meta(*resolve_checkpoint(tmp_path / "native"))["lineage"]
    assert (entry["from"], entry["family"]) == (str(source), "llama")
    assert entry["digests"] == {file.name: sha256(file) for file in source.iterdir()}

    capsys.readouterr()
    run("inspect", f"--checkpoint={tmp_path / 'native'}")
    shown = capsys.readouterr().out
    digest = entry["digests"]["model.safetensors"][:16]
    assert f"came from: {source}: a llama of another project; SHA-256 " in shown
    assert f"model.safetensors {digest}" in shown
    run("inspect", f"--checkpoint={tmp_path / 'native'}", "--json")
    assert json.loads(capsys.readouterr().out)["lineage"] == [entry]


def test_a_run_carries_the_lineage_and_the_files_on(tmp_path):
    """Through a conversion, a run, its resume, and a run from that: to the byte."""
    source = write_foreign(tmp_path)
    run("convert", "--from", source, f"--to={tmp_path / 'native'}")
    train(tmp_path / "native", tmp_path / "a")
    train(tmp_path / "native", tmp_path / "a", steps=3)
    train(f"{tmp_path / 'a'}@3", tmp_path / "b")

    lineage = read_meta(*resolve_checkpoint(tmp_path / "b"))["lineage"]
    assert [one["from"] for one in lineage] == [
        str(source),
        str(tmp_path / "native"),
        str(tmp_path / "a"),
    ]
    manifest = tmp_path / "native/checkpoints/0/manifest.json"
    assert lineage[1]["digests"] == {"manifest.json": sha256(manifest)}
    for exported in (tmp_path / "a/hf/2", tmp_path / "a/hf/3", tmp_path / "b/hf/2"):
        for name in (*FILES, "tokenizer.json"):
            assert (exported / name).read_bytes() == (source / name).read_bytes(), exported

    run("inspect", f"--checkpoint={tmp_path / 'b'}", "--verify")


def test_a_run_from_the_directory_itself_keeps_the_same(tmp_path):
    source = write_foreign(tmp_path)
    train(source, tmp_path / "a")
    [entry] = read_meta(*resolve_checkpoint(tmp_path / "a"))["lineage"]
    assert entry["digests"]["model.safetensors"] == sha256(source / "model.safetensors")
    for name in (*FILES, "tokenizer.json"):
        assert (tmp_path / "a/hf/2" / name).read_bytes() == (source / name).read_bytes()


def test_another_tokenizer_leaves_out_the_files_of_the_first(tmp_path):
    """Its own tokenizer is exported, and files of the source's are named."""
    source = write_foreign(tmp_path)
    lines = train(source, tmp_path / "a", tokenizer=f"{source / 'tokenizer.json'}+chat")
    [line] = [line for line in lines if "so not kept" in line]
    left_out = "tokenizer.json, tokenizer_config.json, special_tokens_map.json"
    assert line.endswith(f"so not kept: {left_out}")
    exported = tmp_path / "a/hf/2"
    assert not (exported / "special_tokens_map.json").exists()
    assert (exported / "chat_template.jinja").read_bytes() == FILES["chat_template.jinja"]
    assert (exported / "tokenizer.json").exists()


def test_a_mean_names_all_its_sources(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_foreign(tmp_path / name)
    sources = [tmp_path / "a/hf", tmp_path / "b/hf"]
    run("convert", "--from", *sources, f"--to={tmp_path / 'mean'}")
    lineage = read_meta(*resolve_checkpoint(tmp_path / "mean"))["lineage"]
    assert [one["from"] for one in lineage] == list(map(str, sources))


def test_a_checkpoint_of_an_earlier_version_has_no_digests(tmp_path):
    """Its lineage is read, and shown without them."""
    entry = {"from": "a", "step": 3, "tokens": 12, "data": "b.txt", "content": ""}
    assert describe_entry(entry) == "a: step 3, 12 tokens of b.txt"
