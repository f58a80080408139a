"""What cannot be run is refused in one line, with its exit code.

The line names the thing, its value and the way out.
"""

import contextlib
import fcntl
import json
import lzma
import math
import resource
import shutil
import subprocess
from pathlib import Path

import jax
import pytest
import runs

from gpt_jax.commands.config_file import load_config
from gpt_jax.data.tokenizers.spec import resolve_tokenizer
from gpt_jax.data.tokens.cache import prepare
from gpt_jax.train import CHECKPOINT_FOLDER
from gpt_jax.train.checkpoint import checkpoints, manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the text and its token cache."""
    return tmp_path_factory.mktemp("bad_input")


@pytest.fixture(scope="module")
def trained(folder):
    """A workdir with whole checkpoints of steps 1 and 2, on bytes.

    Tests that damage it copy it first.
    """
    runs.call(
        *runs.arguments(
            folder,
            folder / "trained",
            "--config.train.steps=2",
            "--config.checkpoint.every_steps=1",
            "--config.eval.batches=1",
        )
    )
    return folder / "trained"


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def refused(code: int, words: tuple[str, ...], *given) -> str:
    """Runs the command line, which must end with `code`. One line must hold all `words`.

    A config may have several faults, and each has a line of its own.
    """
    ending, message = runs.refusal(*given)
    assert ending == code, message
    lines = message.split("\n")
    assert len(lines) == 1 or all(line.startswith("config.") for line in lines), message
    matches = [line for line in lines if all(word in line for word in words)]
    assert matches, message
    return matches[0]


# ---- the config ----

CONFIGS = {
    "unknown key, near one": (
        ["--config.optim.learning_rat=1"],
        [
            "config.optim.learning_rat = '1'",
            "unknown key",
            "did you mean config.optim.learning_rate?",
        ],
    ),
    "unknown key, nothing near": (
        ["--config.log.xyzzy=1"],
        ["config.log.xyzzy", "known keys: every_steps"],
    ),
    "unknown section": (["--config.modle.heads=2"], ["config.modle", "did you mean config.model?"]),
    "a section": (["--config.model=2"], ["config.model = '2'", "is a section"]),
    "text for a number": (
        ["--config.train.steps=many"],
        ["config.train.steps = 'many'", "expected int"],
    ),
    "half a step": (["--config.train.steps=1.5"], ["config.train.steps = '1.5'", "expected int"]),
    "no truth value": (
        ["--config.model.tied=maybe"],
        ["config.model.tied = 'maybe'", "expected bool"],
    ),
    "not finite": (
        ["--config.optim.learning_rate=nan"],
        ["config.optim.learning_rate = nan", "finite"],
    ),
    "wrong entries": (
        ["--config.model.windows=(1,'a')"],
        ["config.model.windows[1] = 'a'", "expected int"],
    ),
    "below the range": (
        ["--config.model.layers=0"],
        ["config.model.layers = 0", "from 1 to 10000"],
    ),
    "above the range": (
        ["--config.model.dropout=1.5"],
        ["config.model.dropout = 1.5", "from 0.0 to 0.99"],
    ),
    "no such choice": (
        ["--config.model.norm=batch"],
        ["config.model.norm = 'batch'", "choose one of layernorm"],
    ),
    "stages": (
        ["--config.mesh.pipeline=8"],
        ["config.model.layers = 2", "config.mesh.pipeline = 8"],
    ),
    "batch over the mesh": (
        ["--config.train.batch_size=12"],
        ["config.train.batch_size = 12", "pipeline x data x fsdp x expert = 8", "try 16"],
    ),
    "batch over microbatches": (
        ["--config.train.accumulate=3"],
        ["config.train.batch_size = 8", "config.train.accumulate = 3"],
    ),
    "eval batch over the mesh": (
        ["--config.eval.batch_size=3"],
        ["config.eval.batch_size = 3", "pipeline x data x fsdp x expert = 8"],
    ),
    "heads do not divide": (
        ["--config.model.heads=5"],
        ["config.model.heads = 5", "config.model.embed = 32"],
    ),
    "kv heads do not divide": (
        ["--config.model.kv_heads=3"],
        ["config.model.kv_heads = 3", "config.model.heads = 4"],
    ),
    "heads over tensor": (
        ["--config.mesh.tensor=8"],
        ["config.model.heads = 4", "config.mesh.tensor = 8"],
    ),
    "vocab over tensor": (
        ["--config.mesh.tensor=4", "--config.model.vocab=258"],
        ["config.model.vocab = 258", "config.mesh.tensor = 4", "vocab_multiple"],
    ),
    "mesh larger than the machine": (
        ["--config.mesh.data=3"],
        ["config.mesh.data = 3", "8 devices"],
    ),
    "two free axes": (["--config.mesh.fsdp=-1"], ["config.mesh.fsdp = -1", "only one"]),
    "vocab below the tokenizer's": (
        ["--config.model.vocab=200"],
        ["config.model.vocab = 200", "tokenizer's 257", "set 0"],
    ),
    "row beyond the context": (
        ["--config.model.max_seq=16"],
        ["config.model.max_seq = 16", "seq_len = 32"],
    ),
    "warmup beyond the end": (
        ["--config.optim.warmup_steps=99"],
        ["config.optim.warmup_steps = 99", "step 20"],
    ),
    "no such tokenizer": (
        ["--config.data.tokenizer=words"],
        ["config.data.tokenizer = 'words'", "bytes, char, bpe:N"],
    ),
    "bpe too small": (
        ["--config.data.tokenizer=bpe:99"],
        ["config.data.tokenizer = 'bpe:99'", "at least 257"],
    ),
    "value embeddings over fsdp": (
        [
            "--config.model.value_embed=true",
            "--config.model.kv_heads=1",
            "--config.mesh.fsdp=8",
            "--config.model.head_dim=4",
            "--config.mesh.data=1",
        ],
        ["config.model.kv_heads = 1", "config.model.head_dim = 4", "fsdp x expert x context = 8"],
    ),
    "momentum with no decay": (
        ["--config.optim.muon_momentum_final=0.9"],
        ["config.optim.muon_momentum_final = 0.9", "config.optim.schedule = 'cosine'", "use wsd"],
    ),
    "smear beyond the width": (
        ["--config.model.smear=true", "--config.model.smear_gate=99"],
        ["config.model.smear_gate = 99", "config.model.embed = 32"],
    ),
    "no loss scaling": (
        ["--config.compute.dtype=float16"],
        ["config.compute.dtype = 'float16'", "float32, bfloat16"],
    ),
    "sample prompt of unknown characters": (
        ["--config.data.tokenizer=char", "--config.eval.sample_prompts=('a','Z')"],
        ["config.eval.sample_prompts[1] = 'Z'", "character 0", "char tokenizer"],
    ),
    "sample prompt beyond the context": (
        ["--config.eval.sample_prompts=('a','%s')" % ("b" * 40)],
        ["config.eval.sample_prompts[1]", "40 tokens", "context of 32", "shorten"],
    ),
    "decay before the warmup ends": (
        [
            "--config.optim.schedule=wsd",
            "--config.optim.decay_fraction=0.95",
            "--config.optim.warmup_steps=4",
        ],
        ["config.optim.decay_fraction = 0.95", "step 1", "config.optim.warmup_steps = 4"],
    ),
    "xz of nothing": (
        ["--config.eval.compare_xz=true", "--config.data.eval_fraction=0"],
        ["config.eval.compare_xz = True", "config.data.eval_fraction is 0"],
    ),
    "unknown best metric": (
        ["--config.checkpoint.best_metric=train/loss"],
        ["config.checkpoint.best_metric", "eval/loss"],
    ),
    "seed beyond 32 bits": (
        ["--config.seed=4294967296"],
        ["config.seed = 4294967296", "4294967295"],
    ),
    "bpe too large": (
        ["--config.data.tokenizer=bpe:99999999999999999999"],
        ["config.data.tokenizer", "10,000,000"],
    ),
    "batch too large": (
        ["--config.train.batch_size=2000000000"],
        ["config.train.batch_size = 2000000000", "more text"],
    ),
    "text for a tuple": (
        ["--config.model.pattern=foo"],
        ["config.model.pattern = 'foo'", "such as (a, b)"],
    ),
    "kernel that cannot run here": (
        ["--config.compute.kernel=cudnn"],
        ["config.compute.kernel", "cudnn"],
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_config(folder, tmp_path, name):
    overrides, words = CONFIGS[name]
    refused(2, words, *runs.arguments(folder, tmp_path / "run", *overrides))
    assert not (tmp_path / "run/config.json").exists()  # refused before the run began


# ---- the command line ----

LINES = {
    "unknown command": (["trian"], ["unknown command 'trian'", "train, evaluate, generate"]),
    "no config": (["train", "--workdir=x"], ["--config", "train --help"]),
    "no workdir": (["train", f"--config={runs.TINY}"], ["--workdir is missing"]),
    "bad flag": (
        ["train", f"--config={runs.TINY}", "--workdirs=x"],
        ["unknown argument '--workdirs=x'"],
    ),
    "bad flag of generate": (
        ["generate", "--checkpoint=x", "--temprature=1"],
        ["--temprature=1", "generate --help"],
    ),
    "not a number": (
        ["generate", "--checkpoint=x", "--temperature=hot"],
        ["--temperature", "'hot'"],
    ),
    "no checkpoint given": (["evaluate"], ["--checkpoint", "evaluate --help"]),
    "negative batches": (
        ["evaluate", "--checkpoint=x", "--batches=-1"],
        ["--batches", "0 or more"],
    ),
    "override without a value": (
        ["train", f"--config={runs.TINY}", "--config.seed"],
        ["--config.seed", "needs a value"],
    ),
    "no such config": (
        ["train", f"--config={runs.ROOT}/configs/tyni.py"],
        ["tyni.py", "no such file", "tiny.py"],
    ),
    "no such variant": (
        ["train", f"--config={runs.TINY}:large"],
        ["tiny.py:large", "no variants", "'large'"],
    ),
    "no such preset": (
        ["train", f"--config={runs.ROOT}/configs/gpt2.py:9b"],
        ["gpt2.py:9b", "124m"],
    ),
    "bad profile": (
        ["train", f"--config={runs.TINY}", "--workdir=x", "--profile=9:3"],
        ["--profile=9:3", "START:STOP"],
    ),
    "profile beyond the end": (
        ["train", f"--config={runs.TINY}", "--workdir=x", "--profile=9:30"],
        ["<= 20 steps"],
    ),
    "processes without address": (
        ["evaluate", "--checkpoint=x", "--num_processes=2"],
        ["--num_processes=2", "--coordinator=HOST:PORT"],
    ),
    "address without processes": (
        ["evaluate", "--checkpoint=x", "--coordinator=h:1"],
        ["--coordinator=h:1", "--num_processes=N"],
    ),
    "no process": (
        ["evaluate", "--checkpoint=x", "--num_processes=0"],
        ["--num_processes=0", "1 or more"],
    ),
    "fewer than no devices": (
        ["evaluate", "--checkpoint=x", "--cpu_devices=-3"],
        ["--cpu_devices=-3", "expected 0 to 1024"],
    ),
    "one device of one process": (
        ["evaluate", "--checkpoint=x", "--local_device=1"],
        ["--local_device=1", "CUDA_VISIBLE_DEVICES=1"],
    ),
    "longer than anybody waits": (
        [
            "evaluate",
            "--checkpoint=x",
            "--coordinator=h:1",
            "--num_processes=2",
            "--join_seconds=3000000000",
        ],
        ["--join_seconds=3000000000", "expected 1 to 86400"],
    ),
    "heartbeats once a century": (
        ["evaluate", "--checkpoint=x", "--heartbeat_seconds=99999999999999999"],
        ["--heartbeat_seconds=99999999999999999", "expected 1 to 86400"],
    ),
    "devices of several": (
        ["generate", "--checkpoint=x", "--devices=2", "--cpu_devices=4"],
        ["--devices=2", "leave it out"],
    ),
    "devices of generate": (
        ["generate", "--checkpoint=x", "--devices=-1"],
        ["--devices=-1", "0 or more"],
    ),
    "print_config checks": (
        ["train", f"--config={runs.TINY}", "--print_config", "--config.model.heads=5"],
        ["config.model.heads = 5"],
    ),
    "process beyond the job": (
        ["evaluate", "--checkpoint=x", "--process_id=1"],
        ["--process_id=1", "expected 0 to 0"],
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_command_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, words = LINES[name]
    refused(2, words, *command)
    assert not list(tmp_path.iterdir())


FILES = {
    "syntax error": ("def get_config(:\n", ["line 1"]),
    "other mistake": ("def get_config():\n    return nothing\n", ["nothing"]),
    "an exit": ("raise SystemExit(7)\n", ["SystemExit: 7"]),
    "no such module": ("import no_such_module_at_all\n", ["no_such_module_at_all"]),
    "no get_config": ("values = 1\n", ["has no get_config()"]),
    "not a ConfigDict": ("def get_config():\n    return None\n", ["get_config()"]),
    "unknown key": (
        "from ml_collections import ConfigDict\ndef get_config():\n"
        "    return ConfigDict(dict(model=dict(layer=2)))\n",
        ["config.model.layer = 2", "config.model.layers?"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_config_file(tmp_path, name):
    content, words = FILES[name]
    (tmp_path / "mine.py").write_text(content)
    words = words if "unknown" in name else ["mine.py", *words]
    refused(2, words, "train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")


def test_workdir_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()  # a path below a file: not even root can write there
    refused(
        2,
        [f"--workdir={tmp_path}/file/run", "cannot be written"],
        *runs.arguments(folder, tmp_path / "file/run"),
    )


@pytest.mark.parametrize("given", [["train", f"--config={runs.TINY}"], ["inspect", "--batch=1"]])
def test_workdir_on_an_object_store(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(2, [], *given, "--workdir=gs://bucket/run") == (
        "--workdir=gs://bucket/run: object stores are not supported; mount a folder that all hosts "
        "share"
    )
    assert not list(tmp_path.iterdir())


# ---- data ----

TEXT = b"plain words, plain words, and more of the same.\n"
DATA = {
    "missing": ({}, ["none.txt"], ["config.data.path = ", "none.txt", "no such file"]),
    "no match": ({}, ["*.md"], ["*.md", "no file matches"]),
    "empty": ({"a.txt": b""}, ["a.txt"], ["a.txt", "no text in this file"]),
    "nothing usable": ({"a.exe": TEXT}, [""], ["no usable files", ".txt"]),
    "unreadable suffix": ({"a.exe": TEXT}, ["a.exe"], ["a.exe", "no usable files"]),
    "binary among text": (
        {"a.txt": TEXT * 99, "b.txt": TEXT + b"\x00\x01" + TEXT},
        [""],
        ["b.txt: byte 48 is NUL", "binary", "take it out"],
    ),
    "undecodable": (
        {"a.txt": TEXT, "b.txt": TEXT * 2 + b"\xff" + TEXT},
        [""],
        ["b.txt: not UTF-8 at byte 96 (0xff)", "--config.data.errors=replace"],
    ),
    "no json": (
        {"a.jsonl": b'{"text": "one"}\n{"text": \n'},
        ["a.jsonl"],
        ["a.jsonl:2", "not JSON"],
    ),
    "no such field": (
        {"a.jsonl": b'{"body": "one"}\n'},
        ["a.jsonl"],
        ["a.jsonl:1", "config.data.field = 'text'", "body"],
    ),
    "half a gzip file": (
        {"a.txt.gz": b"\x1f\x8b\x08\x00\x00\x00"},
        ["a.txt.gz"],
        ["a.txt.gz", "damaged or incomplete"],
    ),
    "a damaged later stream": (
        {"a.txt.xz": lzma.compress(TEXT * 99) + b"damaged" + lzma.compress(TEXT)},
        ["a.txt.xz"],
        ["a.txt.xz: a damaged or incomplete .xz file", "copy it again"],
    ),
    "smaller than a batch": (
        {"a.txt": TEXT * 5},
        ["a.txt"],
        [
            "config.train.batch_size = 8",
            "217 tokens",
            "6 rows",
            "config.train.seq_len = 32",
            "more text",
        ],
    ),
    "shorter than a row": (
        {"a.txt": b"too short to be"},
        ["a.txt"],
        ["config.train.seq_len = 32", "a row needs 33"],
    ),
    "one document by hash": (
        {"a.txt": TEXT * 99},
        ["a.txt", "--config.data.split=document"],
        ["config.data.split = 'document'", "two different documents"],
    ),
}


def on_data(tmp_path: Path, path: str, *overrides: str) -> list[str]:
    return [
        "train",
        f"--config={runs.TINY}",
        f"--workdir={tmp_path}/run",
        f"--config.data.path={tmp_path}/data/{path}",
        f"--config.data.cache={tmp_path}/cache",
        "--config.log.progress=false",
        "--config.train.steps=1",
        "--config.optim.warmup_steps=0",
        "--config.eval.batches=1",
        *overrides,
    ]


@pytest.mark.parametrize("name", DATA)
def test_data(tmp_path, name):
    files, (path, *overrides), words = DATA[name]
    (tmp_path / "data").mkdir()
    for file, content in files.items():
        (tmp_path / "data" / file).write_bytes(content)
    refused(2, words, *on_data(tmp_path, path, *overrides))
    assert not list(tmp_path.glob("cache/*/meta.json")) or "seq_len" in " ".join(
        words
    )  # else nothing looks usable


def test_no_data_path(tmp_path):
    refused(
        2,
        ["config.data.path is empty", "name files"],
        "train",
        f"--config={runs.TINY}",
        f"--workdir={tmp_path}/run",
    )


def test_cache_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").touch()
    refused(
        2,
        ["config.data.cache", "choose a folder"],
        *runs.arguments(folder, tmp_path / "run", f"--config.data.cache={tmp_path}/file/cache"),
    )


def test_replacing_goes_on(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_bytes(TEXT * 20 + b"\xff" + TEXT * 20)
    runs.call(*on_data(tmp_path, "a.txt", "--config.data.errors=replace"))
    assert "1 undecodable places replaced" in capsys.readouterr().out
    assert checkpoints.latest_valid(tmp_path / "run" / CHECKPOINT_FOLDER) == 1


@pytest.mark.parametrize("packing", ["window", "chunk", "document", "first_fit", "best_fit"])
def test_documents_shorter_than_the_context(tmp_path, packing):
    """They share rows. Nothing is dropped, and the run is an ordinary one."""
    (tmp_path / "data").mkdir()
    texts = [f"short {i}" for i in range(100)]
    (tmp_path / "data/a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    command = on_data(tmp_path, "a.jsonl", f"--config.data.packing={packing}")
    runs.call(*command)
    config = load_config(runs.TINY, [text for text in command if text.startswith("--config.")])
    prepared = prepare(config.data, resolve_tokenizer(config.data.tokenizer), lambda line: None)
    pieces = [
        side.ids(a, b - 1)
        for side in (prepared.train, prepared.eval)
        for a, b in zip(side.offsets, side.offsets[1:], strict=False)
    ]
    assert [prepared.tokenizer.decode(ids) for ids in pieces] == texts
    assert runs.curve(tmp_path / "run")[1] == pytest.approx(math.log(264), abs=0.1)


# ---- workdirs and checkpoints ----


@pytest.mark.parametrize(
    "override, words",
    [
        ("--config.model.layers=3", ["config.model.layers (2 there, 3 now)"]),
        ("--config.model.embed=64", ["config.model.embed (32 there, 64 now)"]),
        ("--config.optim.optimizer=lion", ["config.optim.optimizer ('adamw' there, 'lion' now)"]),
    ],
)
def test_workdir_of_another_architecture(folder, trained, override, words):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    refused(
        2, [str(trained), *words, "another --workdir"], *runs.arguments(folder, trained, override)
    )
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_workdir_of_another_tokenizer(tmp_path):
    (tmp_path / "data").mkdir()
    for text in (TEXT * 40, TEXT * 40 + b"Z"):
        (tmp_path / "data/a.txt").write_bytes(text)
        command = on_data(
            tmp_path, "a.txt", "--config.data.tokenizer=char", "--config.model.vocab=64"
        )
        if b"Z" not in text:
            runs.call(*command)
    refused(2, [f"{tmp_path}/run", "another tokenizer", "another --workdir"], *command)


def test_workdir_of_another_text(tmp_path, capsys):
    """The content counts and not the name, on resume and when held-out text is split off again."""
    (tmp_path / "data").mkdir()
    first, second = (tmp_path / "data" / name for name in ("a.txt", "b.txt"))
    first.write_bytes(TEXT * 40)
    runs.call(*on_data(tmp_path, "a.txt"))
    second.write_bytes(first.read_bytes())
    runs.call(*on_data(tmp_path, "b.txt", "--config.train.steps=2", "--config.optim.decay_steps=1"))
    assert "config.data.path changed since the checkpoint" in capsys.readouterr().out
    second.write_bytes(TEXT.upper() * 40)
    refused(
        2, [f"{tmp_path}/run", "another text", "another --workdir"], *on_data(tmp_path, "b.txt")
    )
    refused(
        2,
        ["this text has changed since the run", "--text"],
        "evaluate",
        f"--checkpoint={tmp_path}/run",
    )
    second.unlink()
    refused(
        2,
        ["the run's own text", "b.txt", "no such file", "--text"],
        "evaluate",
        f"--checkpoint={tmp_path}/run",
    )


def test_workdir_in_use(folder, trained):
    with open(trained / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(
            42,
            [f"--workdir={trained}", "another run is training into it"],
            *runs.arguments(folder, trained),
        )


def test_profile_before_the_resumed_step(folder, copy):
    refused(
        2, ["--profile=2:4", "goes on at step 3"], *runs.arguments(folder, copy), "--profile=2:4"
    )


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_checkpoint_path_missing(trained, command):
    nearest = f"found {trained} (steps 1, 2)"
    refused(
        2,
        [f"'{trained.parent}/trianed': does not exist", nearest],
        command,
        f"--checkpoint={trained.parent}/trianed",
    )
    refused(2, ["no step 7", "1, 2"], command, f"--checkpoint={trained}", "--step=7")
    refused(2, ["no step -1", "1, 2"], command, f"--checkpoint={trained}", "--step=-1")
    refused(
        2, ["is step 1, but step 2"], command, f"--checkpoint={trained}/checkpoints/1", "--step=2"
    )


def test_evaluate_text_missing(trained):
    refused(
        2,
        ["--text = 'none.txt'", "no such file"],
        "evaluate",
        f"--checkpoint={trained}",
        "--text",
        "none.txt",
    )


def damage(workdir: Path, *steps: int) -> None:
    """Flips a bit in the largest file of each step."""
    for step in steps:
        file = max(
            (workdir / CHECKPOINT_FOLDER / str(step)).rglob("*"),
            key=lambda p: p.is_file() and p.stat().st_size,
        )
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)


def test_no_valid_checkpoint(folder, copy):
    damage(copy, 1, 2)
    words = [str(copy), "no valid checkpoint", "step 2: ", "step 1: ", "sha256"]
    refused(51, words, "evaluate", f"--checkpoint={copy}")
    refused(51, words, "generate", f"--checkpoint={copy}")
    refused(51, words, *runs.arguments(folder, copy))
    refused(51, ["step 2", "damaged"], "generate", f"--checkpoint={copy}", "--step=2")


def test_damaged_newest_is_named_and_passed_over(copy, capsys):
    damage(copy, 2)
    runs.call("generate", f"--checkpoint={copy}", "--prompt=a", "--max_new_tokens=1")
    output = capsys.readouterr().err
    assert (
        "checkpoint step 2 in" in output
        and "is damaged and is passed over" in output
        and "sha256" in output
    )
    assert f"step 1 of {copy}" in output


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"config": 3}, ["config: expected an object, got 3"]),
        ({"data": {"next": 2}}, ["data.content: missing"]),
        ({"tokenizer": "{}"}, ["its tokenizer cannot be used", "kind: missing"]),
    ],
)
def test_a_checkpoint_of_another_shape(copy, changes, words):
    """Its digests are right: whoever can write there can seal what they like."""
    for step in ("1", "2"):
        folder = copy / CHECKPOINT_FOLDER / step
        meta = json.loads((folder / "meta.json").read_bytes())
        (folder / "meta.json").write_text(json.dumps(meta | changes))
        manifest.write_manifest(folder)
    refused(51, words, "generate", f"--checkpoint={copy}", "--prompt=a")


def test_a_log_keeps_no_run_from_going_on(folder, copy, capsys):
    lines = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines + '{"step": 1, "train/loss": "low"}\n')
    (copy / "config.json").unlink()
    more = runs.arguments(folder, copy, "--config.train.steps=3")
    runs.call(*more)
    assert "left out" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 3

    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").mkdir()
    runs.call(*runs.arguments(folder, copy, "--config.train.steps=4"))
    assert "is a folder, where a file belongs" in capsys.readouterr().out


def test_a_config_of_a_workdir_that_is_none(copy):
    for text in ("[" * 200_000, "[1]", '{"data": 3}', "\xff"):
        (copy / "config.json").write_bytes(text.encode("latin-1"))
        ending, _ = runs.refusal("inspect", f"--workdir={copy}", "--batch=1")
        assert ending == 2


# ---- prompts ----


def test_prompts(trained, tmp_path, capsys):
    generate = "generate", f"--checkpoint={trained}", "--max_new_tokens=4"
    refused(
        2,
        ["prompt 1 has 40 tokens", "context holds 32", "31 or fewer", "--truncate"],
        *generate,
        f"--prompt={'a' * 40}",
    )
    capsys.readouterr()
    runs.call(*generate, f"--prompt={'a' * 40}", "--truncate")
    assert "kept the last 28 of 40 tokens, cut the first 12" in capsys.readouterr().err
    (tmp_path / "windows.txt").write_bytes("\ufeffab\r\ncd\r\n".encode())
    capsys.readouterr()
    runs.call(*generate, f"--prompts={tmp_path}/windows.txt", "--json")
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == [
        "ab",
        "cd",
    ]
    refused(2, ["--top_k = 9999999999", "from 0 to"], *generate, "--top_k=9999999999")
    refused(2, ["--prompts=none.txt", "cannot be read"], *generate, "--prompts=none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    refused(2, ["latin.txt", "cannot be read"], *generate, f"--prompts={tmp_path}/latin.txt")
    refused(2, ["--top_p = 2.0", "from 0.0 to 1.0"], *generate, "--top_p=2")
    refused(2, ["--num_samples = 0", "at least 1"], *generate, "--num_samples=0")
    refused(2, ["--stop = ''"], *generate, "--stop=")


def test_prompt_unknown_to_the_character_tokenizer(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_bytes(TEXT * 40)
    runs.call(*on_data(tmp_path, "a.txt", "--config.data.tokenizer=char"))
    generate = "generate", f"--checkpoint={tmp_path}/run"
    refused(
        2, ["character 6, '我'", "char tokenizer", "leave it out"], *generate, "--prompt=plain 我"
    )
    refused(2, ["prompt 1 is empty", "give a prompt"], *generate)


# ---- what turns bad during the run ----


@contextlib.contextmanager
def files_at_most(size: int):
    """Writing more than `size` bytes to any file fails, as on a full disk.

    Nothing goes into the compilation cache of the other tests.
    """
    before, key = (
        resource.getrlimit(resource.RLIMIT_FSIZE),
        "jax_persistent_cache_min_compile_time_secs",
    )
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update(key, 1e9)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update(key, seconds)


def test_full_disk_while_saving(folder, copy):
    more = runs.arguments(
        folder, copy, "--config.train.steps=4", "--config.checkpoint.every_steps=1"
    )
    with files_at_most(64 << 10):
        refused(
            50,
            [str(copy), "saving step 3 failed", "MiB free", "checkpoint of step 2 is untouched"],
            *more,
        )
    assert checkpoints.latest_valid(copy / CHECKPOINT_FOLDER) == 2
    runs.call(*more)  # room again: the same command goes on
    assert checkpoints.latest_valid(copy / CHECKPOINT_FOLDER) == 4


def test_a_run_that_diverges(folder, tmp_path):
    refused(
        30,
        ["at step 1 is", "config.optim.learning_rate", "config.optim.clip"],
        *runs.arguments(
            folder,
            tmp_path / "run",
            "--config.optim.learning_rate=1e38",
            "--config.optim.warmup_steps=0",
        ),
    )


def test_data_truncated_during_the_run(folder, tmp_path):
    """A real process ends with code 20 and one line below its output, without a traceback."""
    runs.arguments(folder, tmp_path)  # makes the text
    command = [
        "train",
        f"--config={runs.TINY}",
        f"--workdir={tmp_path}/run",
        f"--config.data.path={folder}/text.txt",
        f"--config.data.cache={tmp_path}/cache",
        "--config.log.progress=false",
        "--config.train.steps=1000000",
        "--config.eval.every_steps=0",
        "--config.checkpoint.every_steps=0",
    ]
    process = runs.Process(tmp_path / "process", command)
    try:
        process.until(runs.logged(tmp_path / "run", 3), "step 3")
        [tokens] = tmp_path.glob("cache/*/train.tokens")
        with open(tokens, "r+b") as file:
            file.truncate(100)
        process.end(20)
    finally:
        process.kill()
    *shown, line = process.err.splitlines()
    assert (
        line.startswith("gpt-jax: ")
        and "train.tokens: changed during the run" in line
        and "start again" in line
    )
    assert all(row.startswith(("step ", "process 0 of 1 ")) for row in shown)


def test_a_process_says_one_line(tmp_path):
    process = runs.Process(
        tmp_path,
        [
            "train",
            f"--config={runs.TINY}",
            "--config.model.heads=5",
            f"--config.data.path={runs.TINY}",
            f"--workdir={tmp_path}/run",
        ],
        start=subprocess.Popen,
    )
    process.end(2)
    assert (
        process.err.startswith("gpt-jax: config.model.heads = 5: does not divide")
        and process.err.count("\n") == 1
    )
    assert process.out == ""
