"""The commands that take a checkpoint, and what all commands share.

Their numbers are the right ones, and standard output has what was asked for.
"""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.commands import environment, main as commands, runtime
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.runtime import add_runtime_flags, start_runtime
from gpt_jax.data.tokens.cache import load_text
from gpt_jax.errors import EXIT_CODES, NoCheckpoint
from gpt_jax.model.transformer import Transformer
from gpt_jax.run import restore as load
from gpt_jax.run.restore import restore_checkpoint
from gpt_jax.train import CHECKPOINT_FOLDER, read_meta

CHINESE = "我是一个程序员，我喜欢读书。🎉"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the text and its token cache."""
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def trained(folder):
    """A run on three axes of eight devices, which keeps steps 5 and 10."""
    runs.call(
        *runs.arguments(
            folder,
            folder / "run",
            "--config.train.steps=10",
            "--config.checkpoint.every_steps=5",
            "--config.eval.every_steps=5",
            "--config.mesh.data=2",
            "--config.mesh.fsdp=2",
            "--config.mesh.tensor=2",
        )
    )
    return folder / "run"


@pytest.fixture(scope="module")
def chinese(folder):
    """A run on bytes that knows one line of Chinese by heart."""
    text = folder / "chinese.txt"
    text.write_text((CHINESE + "\n") * 300)
    runs.call(
        *runs.arguments(
            folder,
            folder / "chinese",
            f"--config.data.path={text}",
            "--config.train.steps=150",
            "--config.train.seq_len=64",
            "--config.eval.every_steps=0",
            "--config.optim.schedule=constant",
            "--config.checkpoint.every_steps=0",
        )
    )
    return folder / "chinese"


@pytest.fixture
def call(capsysbinary):
    """Runs a command line and returns (standard output, standard error)."""
    capsysbinary.readouterr()

    def run(*given) -> tuple[str, str]:
        runs.call(*given)
        out, err = capsysbinary.readouterr()
        return out.decode(), err.decode()

    return run


# ---- evaluate ----


def heldout(workdir: Path, step: int) -> dict[str, float]:
    """What the run itself measured."""
    return {
        name: runs.curve(workdir, f"eval/{name}")[step]
        for name in ("loss", "perplexity", "bits_per_byte", "accuracy")
    }


def same(row: dict, expected: dict) -> None:
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_evaluate_measures_what_the_run_measured(call, trained):
    """It has all 8 devices along fsdp, and the run had 2 x 2 x 2."""
    for step, flags in ((10, []), (5, ["--step=5"])):
        out, err = call("evaluate", f"--checkpoint={trained}", "--json", *flags)
        report = json.loads(out)
        assert report["step"] == step and report["checkpoint"] == str(trained / CHECKPOINT_FOLDER)
        assert list(report["sources"]) == ["held-out"]
        row = report["sources"]["held-out"]
        same(row, heldout(trained, step))
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(
            row["loss"] * row["tokens"] / row["bytes"] / math.log(2), rel=1e-5
        )
        assert f"step {step} of" in err and "on 8 " in err
    assert call("evaluate", f"--checkpoint={trained}/checkpoints/5", "--json")[0] == out
    assert call("evaluate", f"--checkpoint={trained}/checkpoints", "--step=5", "--json")[0] == out


def test_evaluate_in_a_process_of_its_own(tmp_path, trained):
    """One device, and three that divide neither width nor batch, give the same numbers.

    Standard output has these numbers alone.
    """
    jobs = [
        runs.Process(tmp_path, ["evaluate", f"--checkpoint={trained}", "--json", *flags])
        for flags in ([], ["--cpu_devices=3"])
    ]
    for process, devices in zip(jobs, ("on 1 cpu device", "on 3 cpu devices"), strict=False):
        process.end(0)
        same(json.loads(process.out)["sources"]["held-out"], heldout(trained, 10))
        assert devices in process.err


def test_evaluate_per_source(call, trained, tmp_path):
    """The rows are the sources in the order given, and `all`, which is their sum.

    The table and the JSON agree.
    """
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, words in zip(files, (30, 200), strict=False):
        runs.write_text(file, words)
    command = "evaluate", f"--checkpoint={trained}", "--text", *files
    rows = json.loads(call(*command, "--json")[0])["sources"]
    assert list(rows) == [*map(str, files), "all"]
    a, b, total = rows.values()
    for name in ("tokens", "bytes"):
        assert total[name] == a[name] + b[name]
    assert [a["bytes"], b["bytes"]] == [
        len(file.read_bytes()) - 1 for file in files
    ]  # nothing predicts the first one
    for name in ("loss", "accuracy"):
        assert total[name] == pytest.approx(
            (a[name] * a["tokens"] + b[name] * b["tokens"]) / total["tokens"], rel=1e-5
        )
    header, *lines = call(*command)[0].splitlines()
    assert header.split() == [
        "source",
        "loss",
        "perplexity",
        "bits_per_byte",
        "accuracy",
        "tokens",
        "bytes",
    ]
    for line, (name, row) in zip(lines, rows.items(), strict=True):
        assert line.split() == [
            name,
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.3f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['accuracy']:.4f}",
            f"{row['tokens']:,.0f}",
            f"{row['bytes']:,.0f}",
        ]
    assert len({len(line) for line in (header, *lines)}) == 1  # aligned


def test_evaluate_equals_a_plain_forward_pass(call, trained, tmp_path):
    file = runs.write_text(tmp_path / "a.txt", 100)
    report = json.loads(call("evaluate", f"--checkpoint={trained}", f"--text={file}", "--json")[0])[
        "sources"
    ][str(file)]
    loaded = load.load_model(str(trained), 0, lambda line: None, 1)
    text = load_text((str(file),), loaded.tokenizer, loaded.config.data, report=lambda line: None)
    ids = text.ids(0, text.size).astype(np.int32)
    starts = range(0, len(ids) - 1, 32)  # rows in order, none of which sees the one before
    losses, hits = [], []
    with jax.set_mesh(loaded.mesh):
        forward = jax.jit(
            lambda tokens: Transformer(loaded.config.model, loaded.config.compute).apply(
                {"params": loaded.params}, {"tokens": tokens}
            )
        )
        for start in starts:
            row = ids[start : start + 33]
            tokens = np.zeros(32, np.int32)
            tokens[: len(row) - 1] = row[:-1]
            logits = np.asarray(forward(tokens[None]), np.float64)[0, : len(row) - 1]
            losses += list(
                np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(row) - 1), row[1:]]
            )
            hits += list(logits.argmax(-1) == row[1:])
    same(report, {"loss": np.mean(losses), "accuracy": np.mean(hits), "tokens": len(ids) - 1})
    some = json.loads(
        call(
            "evaluate",
            f"--checkpoint={trained}",
            f"--text={file}",
            "--json",
            "--batches=1",
            "--batch_size=2",
        )[0]
    )["sources"][str(file)]
    assert some["tokens"] == 8 * 32 == 256  # two rows, rounded up to one for each device


def test_a_checkpoint_that_its_run_deletes_meanwhile(trained, tmp_path, monkeypatch):
    """The newest one is looked for again. One that was asked for by its step is not replaced."""
    run, restore = Path(shutil.copytree(trained, tmp_path / "run")), restore_checkpoint

    def deleted(directory, step, wanted):
        if step == 10:
            shutil.rmtree(directory / "10", ignore_errors=True)
        return restore(directory, step, wanted)

    monkeypatch.setattr(load, "restore_checkpoint", deleted)
    lines = []
    assert load.load_model(str(run), 0, lines.append, 1).step == 5
    assert any("step 10 of" in line and "deleted by its run meanwhile" in line for line in lines)
    shutil.copytree(trained / "checkpoints/10", run / "checkpoints/10")
    with pytest.raises(NoCheckpoint):
        load.load_model(str(run), 10, lines.append, 1)


# ---- generate ----


def plain_greedy(workdir: Path, prompt: str, count: int) -> str:
    """Greedy text without cache, batch and buckets: each token takes a pass over the whole text."""
    loaded = load.load_model(str(workdir), 0, lambda line: None, 1)
    model, ids = loaded.config.model, list(loaded.tokenizer.encode(prompt))
    with jax.set_mesh(loaded.mesh):
        forward = jax.jit(
            partial(Transformer(model, loaded.config.compute).apply, {"params": loaded.params})
        )
        for _ in range(count):
            tokens = np.zeros((1, model.max_seq), np.int32)
            tokens[0, : len(ids)] = ids
            ids.append(
                int(
                    np.asarray(forward({"tokens": tokens}))[
                        0, len(ids) - 1, : loaded.tokenizer.vocab
                    ].argmax()
                )
            )
    return loaded.tokenizer.decode(ids[-count:])


def test_greedy_equals_the_plain_loop(call, trained):
    """The same text comes each time, from a checkpoint that was written on another mesh.

    Standard output has the text and nothing else.
    """
    command = (
        "generate",
        f"--checkpoint={trained}",
        "--prompt=abc de",
        "--temperature=0",
        "--max_new_tokens=20",
    )
    out, err = call(*command)
    assert out == plain_greedy(trained, "abc de", 20) and len(out) == 20
    assert call(*command, "--seed=5")[0] == out
    for only in ("--top_k=1", "--top_p=1e-6", "--min_p=1"):  # each leaves the most likely token
        assert call(*command[:3], command[4], "--temperature=1", "--seed=5", only)[0] == out
    assert call(*command, "--repetition_penalty=3")[0] != out
    assert "20 tokens in" in err and "ended by length" in err


def test_generate_several(call, trained, tmp_path):
    """--prompt, --prompts, samples and JSON lines go together.

    A row is the same as when it is generated alone.
    """
    (tmp_path / "prompts.txt").write_text("he\nabc de\n")
    command = (
        "generate",
        f"--checkpoint={trained}",
        "--prompt=é",
        f"--prompts={tmp_path}/prompts.txt",
        "--max_new_tokens=8",
        "--num_samples=2",
        "--seed=3",
    )
    rows = [json.loads(line) for line in call(*command, "--json")[0].splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (p, s) for p in ("é", "he", "abc de") for s in range(2)
    ]
    assert all(set(row) == {"prompt", "sample", "text", "finish", "tokens"} for row in rows)
    assert all(row["finish"] in ("length", "eot") and row["tokens"] <= 8 for row in rows)
    texts = [row["text"] for row in rows]
    assert len(set(texts)) == 6
    assert call(*command)[0] == "".join(text + "\n" for text in texts)
    one = "generate", f"--checkpoint={trained}", "--prompt=he", "--max_new_tokens=8", "--seed=3"
    assert call(*one)[0] == texts[2]
    assert call(*one[:-1], "--seed=4")[0] != texts[2]


def test_generate_step(call, trained):
    command = "generate", f"--checkpoint={trained}", "--prompt=abc", "--max_new_tokens=24"
    newest, older = call(*command)[0], call(*command, "--step=5")[0]
    assert newest != older
    assert call("generate", f"--checkpoint={trained}/checkpoints/5", *command[2:])[0] == older


def test_generate_stop(call, chinese):
    command = "generate", f"--checkpoint={chinese}", "--temperature=0", f"--prompt=\n{CHINESE[:4]}"
    assert call(*command, "--max_new_tokens=36")[0].startswith(CHINESE[4:])
    assert (
        call(*command, "--stop=喜欢", "--stop=书", "--max_new_tokens=36")[0]
        == CHINESE[4 : CHINESE.index("喜")]
    )
    [row] = call(*command, "--json", "--stop=\n")[0].splitlines()
    assert json.loads(row)["text"] == CHINESE[4:] and json.loads(row)["finish"] == "stop"


class Terminal(io.TextIOWrapper):
    """Standard output that keeps what was written, piece by piece."""

    def __init__(self):
        self.pieces, raw = [], io.RawIOBase()
        raw.writable, raw.write = (
            lambda: True,
            lambda data: self.pieces.append(bytes(data)) or len(data),
        )
        super().__init__(
            io.BufferedWriter(raw), encoding="ascii"
        )  # which keeps what is not flushed


def test_streaming_never_cuts_a_character(monkeypatch, chinese):
    """A character of several tokens comes whole, and as soon as it is complete."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        runs.call(
            "generate",
            f"--checkpoint={chinese}",
            "--temperature=0",
            f"--prompt=\n{CHINESE[:3]}",
            "--stop=\n",
        )
    assert [piece.decode() for piece in terminal.pieces if piece] == [*CHINESE[3:]]


def test_bpe_from_text_to_text(call, folder):
    """A tokenizer is trained on Chinese, and a model on its tokens.

    Both commands then need the checkpoint alone.
    """
    file = folder / "bpe.txt"
    file.write_text((CHINESE + "\n") * 300)
    call(
        *runs.arguments(
            folder,
            folder / "bpe",
            f"--config.data.path={file}",
            "--config.data.tokenizer=bpe:280",
            "--config.train.steps=100",
            "--config.eval.every_steps=0",
            "--config.optim.schedule=constant",
        )
    )
    out, _ = call(
        "generate",
        f"--checkpoint={folder / 'bpe'}",
        "--temperature=0",
        f"--prompt={CHINESE[:4]}",
        "--stop=\n",
    )
    assert len(out) >= 5 and set(out) <= set(CHINESE)  # whole characters, all of them known
    row = json.loads(
        call("evaluate", f"--checkpoint={folder / 'bpe'}", f"--text={file}", "--json")[0]
    )["sources"][str(file)]
    assert (
        row["bytes"] == pytest.approx(300 * len((CHINESE + "\n").encode()), rel=1e-3)
        and row["tokens"] < row["bytes"] / 2
    )
    assert row["bits_per_byte"] == pytest.approx(
        row["loss"] * row["tokens"] / row["bytes"] / math.log(2), rel=1e-5
    )


def test_a_process_writes_the_text_alone(tmp_path, trained):
    process = runs.Process(
        tmp_path,
        [
            "generate",
            f"--checkpoint={trained}",
            "--prompt=abc de",
            "--temperature=0",
            "--max_new_tokens=20",
            "--cpu_devices=2",
        ],
    )
    process.end(0)
    assert process.out == plain_greedy(trained, "abc de", 20)
    assert "on 2 cpu devices" in process.err


# ---- config and help ----


@pytest.mark.parametrize("spec", ["tiny.py", "llama.py:8b", "shakespeare_char.py:cpu"])
def test_print_config(call, spec):
    """The JSON gives the same config again.

    Only what follows from the tokenizer is left to derive.
    """
    out, err = call(
        "train",
        f"--config={runs.ROOT}/configs/{spec}",
        "--config.train.steps=7000",
        "--print_config",
    )
    config = configs.from_dict(json.loads(out))
    assert configs.to_json(config) == out.removesuffix("\n") and configs.resolve(config) == config
    assert config.train.steps == 7000 == config.optim.decay_steps or config.optim.decay_steps > 7000
    assert (
        config.model.kv_heads
        and config.model.head_dim
        and config.model.mlp
        and config.model.max_seq
        and not err
    )


def test_the_resolved_config_is_kept(trained):
    """The workdir and every checkpoint have the same config, complete."""
    config = configs.from_dict(json.loads((trained / "config.json").read_text()))
    assert config.model.vocab == 264 and config.compute.kernel != "auto" and config.mesh.tensor == 2
    for step in (5, 10):
        assert configs.from_dict(read_meta(trained / CHECKPOINT_FOLDER, step)["config"]) == config


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_help_of_a_command(capsys, command):
    with pytest.raises(SystemExit) as end:
        runs.call(command, "--help")
    text = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: gpt-jax {command}" in text
    assert "(default: None)" not in text and "(default: )" not in text
    if command == "generate":
        assert "0: off (default: 0)" in " ".join(text.split())
    wanted = {
        "train": ["--config", "--workdir", "--print_config", "--profile"],
        "evaluate": ["--checkpoint", "--step", "--text", "--json"],
        "generate": [
            "--checkpoint",
            "--prompt",
            "--prompts",
            "--max_new_tokens",
            "--temperature",
            "--top_k",
            "--top_p",
            "--min_p",
            "--repetition_penalty",
            "--seed",
            "--stop",
            "--num_samples",
            "--truncate",
        ],
        "prepare": [
            "--input",
            "--output",
            "--tokenizer",
            "--workers",
            "--engine",
            "--on_error",
            "--filters",
            "--dedup",
            "--eval_fraction",
            "--inspect",
            "--verify",
        ],
        "inspect": ["--workdir", "--batch", "--rows", "--chars", "--json"],
        "bench": ["--config", "--batches", "--seconds"],
        "plan": ["--config", "--topology", "--slices", "--compile", "--search", "--json"],
        "launch": ["local", "slurm", "kubernetes"],
    }[command]
    runtime = (
        ["--cpu_devices", "--coordinator"] if command in ("train", "evaluate", "generate") else []
    )
    assert [flag for flag in [*wanted, *runtime] if flag not in text] == []


def test_version(capsys):
    runs.call("--version")
    assert re.fullmatch(r"gpt_jax \d+\.\d+\.\d+ .*source \w+\n", capsys.readouterr().out)


@pytest.mark.parametrize("given", [[], ["--help"], ["help"]])
def test_help(call, given):
    out, err = call(*given)
    assert [name for name in commands.COMMANDS if f"  {name} " not in out] == [] and not err
    assert [code for code, meaning in EXIT_CODES.items() if f"{code} {meaning}" not in out] == []


def test_package_runs_as_a_module(tmp_path):
    process = runs.Process(tmp_path, ["--help"], start=subprocess.Popen)
    process.end(0)
    assert process.out.startswith("usage: gpt-jax ")


def test_several_cpu_devices_have_threads_to_wait_in(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    environs = [{}, {}, {}, {"PJRT_NPROC": "3"}]
    for devices, environ in zip((0, 1, 4, 4), environs, strict=False):
        environment.keep_threads(devices, environ)
    assert environs == [{}, {}, {"PJRT_NPROC": "16"}, {"PJRT_NPROC": "3"}]


@pytest.mark.parametrize(
    "given, several",
    [
        ([], False),
        (["--cpu_devices=1"], False),
        (["--cpu_devices=2"], True),
        (["--num_processes=2", "--coordinator=a:1"], True),
        (["--distributed"], True),
    ],
)
def test_cpu_devices_that_talk_to_each_other_take_one_step_at_a_time(given, several, monkeypatch):
    """With several steps in flight they can wait for each other for ever."""
    changed = {}
    for module, name in (
        (environment, "prepare"),
        (environment, "keep_threads"),
        (runtime, "keep_memory"),
        (runtime, "join_job"),
    ):
        monkeypatch.setattr(module, name, lambda *_: None)
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    parser = Flags()
    add_runtime_flags(parser)
    start_runtime(parser.parse_args(given))
    assert (changed.get("jax_cpu_enable_async_dispatch") is False) == several


def test_a_request_to_stop_during_an_import_is_no_bug(tmp_path):
    """A library in C makes an ImportError of whatever exception comes."""
    (tmp_path / "library.py").write_text(
        "import os\ntry:\n    os.kill(os.getpid(), 15)\nexcept BaseException:\n"
        "    raise ImportError('in the middle') from None\n"
    )
    script = "from gpt_jax.commands import runtime; runtime.end_on_request(); import library"
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{runs.ROOT}:{tmp_path}"},
    )
    assert (process.returncode, process.stderr) == (10, "gpt-jax: stopped on request\n")


TINY_PLAN = f"plan --config={runs.TINY} --topology=v5e:2x2 --config.mesh.data=4"
FULL = "gpt-jax: standard output cannot be written (No space left on device)"


@pytest.mark.parametrize(
    "given, into, code, words",
    [
        (TINY_PLAN, "&-", 0, ""),
        (TINY_PLAN, "/dev/full", 2, f"{FULL}; send it elsewhere"),
        (
            f"{TINY_PLAN} --config.mesh.tensor=3 --json",
            "/dev/full",
            2,
            f"; and {FULL.partition(': ')[2]}",
        ),
        (f"{TINY_PLAN} --config.mesh.tensor=3 --json 2>/dev/full", "&-", 2, ""),
        ("train", "/dev/full", 0, f"{FULL}: nothing more is said there"),
        ("train", "/dev/full 2>&1", 0, ""),
    ],
)
def test_standard_output_that_takes_nothing(tmp_path, given, into, code, words):
    """It is closed by the caller, or on a full disk.

    A run carries on. A command that was asked for output ends.
    """
    if given == "train":
        given = " ".join(runs.arguments(tmp_path, tmp_path / "run", "--config.train.steps=2"))
    process = subprocess.run(
        f"{sys.executable} -m gpt_jax {given} >{into}",
        shell=True,
        capture_output=True,
        text=True,
        cwd=runs.ROOT,
        env=os.environ | {"PYTHONPATH": str(runs.ROOT)},
    )
    assert (
        process.returncode == code and words in process.stderr and "Traceback" not in process.stderr
    )
