"""What all commands share: the config, help, the runtime and standard output."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest
import runs

from gpt_jax import config as configs
from gpt_jax.commands import environment, main as commands, runtime
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.runtime import add_runtime_flags, start_runtime
from gpt_jax.errors import EXIT_CODES
from gpt_jax.train import CHECKPOINT_FOLDER, read_meta


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
        "classify": ["--checkpoint", "--text", "--file", "--out", "--label", "--page"],
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
        "inspect": [
            "--workdir",
            "--batch",
            "--rows",
            "--chars",
            "--json",
            "--checkpoint",
            "--diff",
        ],
        "convert": [
            "--from",
            "--to",
            "--format",
            "--family",
            "--dtype",
            "--tokenizer",
            "--weights",
        ],
        "card": ["--config", "--checkpoint", "--checks", "--out", "--json", "--cpu_devices"],
        "bench": ["--config", "--batches", "--seconds"],
        "plan": ["--config", "--topology", "--slices", "--compile", "--search", "--json"],
        "launch": ["local", "slurm", "kubernetes"],
    }[command]
    runtime = (
        ["--cpu_devices", "--coordinator"]
        if command in ("train", "evaluate", "classify", "generate")
        else []
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
