"""What `gpt-jax plan` says: verdicts, advice, the best mesh, and the command that trains it."""

import os
import re
import shlex
import signal
import time
from contextlib import nullcontext

import pytest
import runs
from plans import CONFIGS, job_of, read_plan, run_plan, spec_of

from gpt_jax.commands import compiling, plan as command
from gpt_jax.commands.config_file import load_config
from gpt_jax.errors import UsageError
from gpt_jax.plan import search
from gpt_jax.plan.topology import parse_topology


@pytest.fixture
def compiler(monkeypatch):
    """A compiler in place of the real one: `compiler(answer)` makes it return that."""

    def install(answer):
        monkeypatch.setattr(command, "compile_outside", lambda args, overrides: answer)
        monkeypatch.setattr(compiling, "is_installed", lambda name: True)

    return install


def find_best(name, machine):
    """Overrides of the mesh that a search likes best."""
    job = job_of(name)
    best = search.search_meshes(job, machine)[0]
    return search.list_overrides(job.config, best.config)


# ---- what cannot run ----


@pytest.mark.parametrize(
    "override, words",
    [
        ("experts_per_token=9", "experts_per_token = 9: is more than config.model.experts = 8"),
        ("heads=7", "heads = 7: does not divide .*; and config.model.kv_heads = 8: must divide"),
        ("kv_heads=3", "kv_heads = 3: must divide"),
        ("windows=()", "windows = .*: needs at least one"),
        ("pattern=()", "pattern = .*: needs at least one"),
    ],
)
def test_a_model_that_is_none_is_refused_before_it_is_traced(override, words):
    with pytest.raises(UsageError, match=rf"^config\.model\.{words}"):
        run_plan("moe:8x7b", "v5p:4x4x4", f"--config.model.{override}")


def test_only_meshes_that_run_are_offered():
    """The config has two pairs of layers, and so no more than two stages."""
    overrides = ["--config.mesh.fsdp=1", "--config.mesh.pipeline=4"]
    words = r"^config\.mesh\.pipeline = 4: a mesh of 4 does not match 16 devices"
    with pytest.raises(UsageError, match=words) as error:
        run_plan("modern:d4", "v5e:4x4", *overrides)
    _, _, offers = str(error.value).partition("the nearest that do: ")
    assert "config.mesh.fsdp=8 config.mesh.pipeline=2" in offers
    assert "pipeline=16" not in offers


@pytest.mark.parametrize(
    "override", ["--config.train.batch_size=2000000000", "--config.model.layers=10000"]
)
def test_absurd_sizes_are_told_at_once(override):
    began = time.process_time()
    words = r"does not fit: peak|config\.model\.layers = 10000: a plan takes 512 at most"
    with pytest.raises(UsageError, match=words):
        run_plan("modern:d4", "v5p:2x2x2", override)
    assert time.process_time() - began < 20  # It takes 2 s. Going through all would take hours.


def test_the_command_says_no_with_code_2(capsys):
    overrides = ["batch_size=8", "accumulate=1"]
    with pytest.raises(UsageError, match="does not fit: peak") as error:
        run_plan(
            "llama:70b",
            "h100:8",
            "--config.eval.batch_size=8",
            *(f"--config.train.{override}" for override in overrides),
        )
    assert error.value.code == 2
    assert "problem: does not fit" in capsys.readouterr().out


def test_where_nothing_fits_the_report_says_so(capsys):
    with pytest.raises(UsageError, match="does not fit: peak"):
        run_plan("llama:70b", "h200:8")
    *_, problem, last = capsys.readouterr().out.splitlines()
    assert problem.startswith("problem: does not fit")
    assert "nothing fits h200:8" in last
    assert "take more devices" in last

    with pytest.raises(UsageError, match="--search: nothing fits h200:8"):
        run_plan("llama:70b", "h200:8", "--search", "--json")
    refusal = read_plan(capsys)
    assert not refusal["fits"]
    assert "take more devices" in refusal["problems"][0]


def test_where_nothing_runs_the_report_says_so():
    words = r"^--search: no mesh of v5p:16x20x28 runs it; with all devices on fsdp config\.model"
    with pytest.raises(UsageError, match=words):
        run_plan("llama:8b", "v5p:16x20x28", "--search")


# ---- flags ----


@pytest.mark.parametrize(
    "flags",
    [
        "--search=-2",
        "--compile=-1",
        "--data_tokens=-5",
        "--data_tokens=nan",
        "--data_tokens=inf",
        "--data_tokens=0.5",
        "--write_bandwidth=inf",
        "--write_bandwidth=1e-300",
        "--write_bandwidth=0",
        "--compile --option=xla_foo",
        "--compile --option==1",
    ],
)
def test_a_flag_out_of_range_is_named(flags):
    with pytest.raises(UsageError, match=f"^{re.escape(flags.split()[-1])}: expected"):
        run_plan("tiny", "v5e:2x2", *flags.split())


def test_an_option_of_the_compiler_without_it_is_refused():
    with pytest.raises(UsageError, match=r"^--option=a=1: is for the compiler; add --compile"):
        run_plan("tiny", "v5e:2x2", "--option=a=1")


def test_options_go_to_the_config(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "report", lambda *args: calls.append(args))
    monkeypatch.setattr(compiling, "is_installed", lambda name: True)
    flags = ["--compile", "--option=a=1", "--option=b=x,y"]
    run_plan("tiny", "v5e:2x2", *flags, "--config.compute.compiler_options=c=2")

    ((_, overrides, config, *_),) = calls
    assert config.compute.compiler_options == ("c=2", "a=1", "b=x,y")
    assert load_config(spec_of("tiny"), overrides) == config


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "there is no program without --compile"),
        (["--compile"], "cannot be written"),
        (["--compile=2", "--search"], "--search compiles one program after the other"),
    ],
)
@pytest.mark.parametrize("place", ["/no/such/folder/x.hlo", str(CONFIGS)])
def test_a_program_that_cannot_be_kept_is_refused_at_once(flags, words, place, monkeypatch):
    monkeypatch.setattr(command, "compile_outside", None)
    with pytest.raises(UsageError, match=f"^--keep_hlo={re.escape(place)}: {words}"):
        run_plan("tiny", "v5e:2x2", f"--keep_hlo={place}", *flags)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--search=0"], "--search=0: expected 1 or more"),
        (["--compile=2"], "--compile=2: without --search"),
        (["--config.mesh.tensor=3"], "config.mesh.tensor = 3"),
        (["--config.trian.steps=1"], "config.trian"),
        (["--slices=x"], "argument --slices: invalid int"),
    ],
)
def test_json_also_of_what_cannot_run(words, message, capsys):
    with pytest.raises(UsageError) as error:
        run_plan("llama:8b", "v5p:2x2x1", "--json", *words)
    refusal = read_plan(capsys)
    assert str(error.value).startswith(message)
    assert refusal["problems"] == [str(error.value)]
    assert not refusal["fits"]


# ---- slices ----

TWO_SLICES = [
    "--slices=2",
    "--json",
    "--config.train.batch_size=1024",
    "--config.eval.batch_size=128",
]


def test_slices_without_sizes_across_them_hold_copies(capsys):
    """It is as if config.mesh.dcn_data had been given, and the report says so."""
    run_plan("llama:8b", "v5p:4x4x4", *TWO_SLICES)
    plain = read_plan(capsys)
    assert plain["fits"]
    assert plain["mesh"]["data"] == 2
    notes = plain.pop("notes")
    assert "--config.mesh.dcn_data=2 is taken" in notes[0]

    run_plan("llama:8b", "v5p:4x4x4", *TWO_SLICES, "--config.mesh.dcn_data=2")
    said = read_plan(capsys)
    assert said.pop("notes") == []
    assert said == plain


def test_sizes_across_slices_that_do_not_match(capsys):
    """It cannot run, although the memory would do."""
    with pytest.raises(
        UsageError, match=r"config\.mesh\.dcn_…: the cross-slice sizes multiply to 4"
    ):
        overrides = ["--config.mesh.dcn_fsdp=4", "--config.mesh.fsdp=32"]
        run_plan("llama:8b", "v5p:4x4x4", *TWO_SLICES, *overrides)
    report = read_plan(capsys)
    assert not report["fits"]
    assert report["verdict"] == report["problems"][0]
    assert report["arithmetic"]["verdict"].startswith("fits")


# ---- search ----


def test_the_winner_of_a_search_reproduces(capsys):
    run_plan("llama:1b", "v5e:4x4", "--json", "--search")
    first = read_plan(capsys)
    steps = [float(f"{row['step_seconds']:.3g}") for row in first["search"]]
    assert steps == sorted(steps)

    winner = [word for word in shlex.split(first["command"]) if word.startswith("--config.")]
    run_plan("llama:1b", "v5e:4x4", "--json", *winner)
    again = read_plan(capsys)
    assert again["fits"]
    assert again["mesh"] == first["mesh"]
    assert again["arithmetic"] == first["arithmetic"]


def test_what_a_search_replaces_is_said(capsys):
    """It is not in the winner's command, which gives the same plan."""
    replaced = [
        "--config.mesh.fsdp=7",
        "--config.compute.remat=offload",
        "--config.train.accumulate=2",
    ]
    others = ["--config.train.batch_size", "64", "--config.eval.batch_size=7"]
    run_plan("llama:1b", "v5e:4x4", "--json", "--search=1", *replaced, *others)
    report = read_plan(capsys)
    assert report["notes"] == [
        *(f"{text}: --search chooses that itself" for text in replaced),
        "--config.eval.batch_size=7: does not divide over the best mesh, and is replaced",
    ]

    words = [word for word in shlex.split(report["command"]) if word.startswith("--config.")]
    keys = [word.partition("=")[0] for word in words]
    assert len(keys) == len({*keys})
    assert "--config.train.batch_size=64" in words
    run_plan("llama:1b", "v5e:4x4", "--json", *words)
    assert read_plan(capsys)["arithmetic"] == report["arithmetic"]


# ---- the compiler ----

SHORT_OF_MEMORY = {"seconds": 1, "refusal": "RESOURCE_EXHAUSTED: out of memory", "peak": 0}
PROGRAM = dict(
    collectives=[], cycles=10**9, kernels={}, matmul_flops=0.0, turn_flops=0.0, grouped_flops=0.0
)


def test_the_report_does_not_offer_what_was_refused(compiler, capsys):
    """The compiler has no memory for what the arithmetic likes best."""
    compiler(SHORT_OF_MEMORY)
    best = find_best("llama:1b", parse_topology("v5e:4x4"))
    with pytest.raises(UsageError, match="RESOURCE_EXHAUSTED"):
        run_plan("llama:1b", "v5e:4x4", "--json", *best, "--compile")
    report = read_plan(capsys)
    assert report["would_fit"] and [] not in report["would_fit"]

    for offer in report["would_fit"]:
        run_plan("llama:1b", "v5e:4x4", "--json", *best, *offer)
        peak = read_plan(capsys)["arithmetic"]["memory"]["peak"]
        assert peak < report["arithmetic"]["memory"]["peak"]


def test_no_command_is_offered_that_the_compiler_refused(compiler, capsys):
    compiler(SHORT_OF_MEMORY)
    with pytest.raises(UsageError, match="RESOURCE_EXHAUSTED"):
        run_plan("llama:1b", "v5e:4x4", "--search=1", "--compile", "--json")
    assert "command" not in read_plan(capsys)


@pytest.mark.parametrize("over", [0.5, 2.0])
def test_json_has_one_verdict(over, compiler, capsys):
    """It is the compiler's if that was asked, whatever the arithmetic said.

    The days of the run are those of the compiled step, and say so.
    """
    machine = parse_topology("v5e:4x4")
    sizes = dict.fromkeys(("argument", "output", "alias", "temporary"), 1)
    peak = over * machine.chip.memory
    compiler({"seconds": 1, "refusal": "", "peak": peak, "program": PROGRAM, **sizes})
    best = find_best("llama:1b", machine)

    run_plan("llama:1b", "v5e:4x4", "--json", *best)
    alone = read_plan(capsys)
    assert alone["fits"]
    assert alone["by"] == alone["run"]["by"] == "arithmetic"
    assert alone["problems"] == []

    refusal = pytest.raises(UsageError, match="does not fit: peak")
    with refusal if over > 1 else nullcontext():
        run_plan("llama:1b", "v5e:4x4", "--json", *best, "--compile")
    report = read_plan(capsys)
    assert report["arithmetic"] == alone["arithmetic"]
    assert report["by"] == report["run"]["by"] == "compiler"
    assert report["fits"] == (over < 1) == report["verdict"].startswith("fits: peak")
    assert report["problems"] == ([] if over < 1 else [report["verdict"]])
    steps = job_of("llama:1b").config.train.steps
    assert report["run"]["days"] == pytest.approx(report["schedule"]["step"] * steps / 86_400)
    assert "step_seconds" not in report
    assert "memory" not in report


@pytest.mark.parametrize("machine, package", [("v5e:2x2", "libtpu"), ("h100:8", "jax[cuda13]")])
def test_a_compiler_that_is_not_installed(machine, package, monkeypatch):
    monkeypatch.setattr(compiling, "is_installed", lambda name: False)
    with pytest.raises(UsageError, match=f"pip install .*'{re.escape(package)}'"):
        run_plan("tiny", machine, "--compile")


# The command, with a compiler's process that writes its number and sleeps.
COMMAND = """
import sys
from gpt_jax.commands import compiling, main
compiling.is_installed = lambda name: True
sys.executable = sys.argv.pop(1)
main.main(sys.argv[1:])
"""


def test_a_request_to_stop_ends_the_compiler_too(tmp_path):
    """The process that compiles is a child of the command."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    python.chmod(0o755)
    words = [
        str(python),
        "plan",
        f"--config={spec_of('tiny')}",
        "--topology=v5e:2x2",
        "--config.mesh.data=4",
        "--compile",
    ]
    process = runs.Process(tmp_path / "logs", words, ("-c", COMMAND))
    process.until((tmp_path / "pid").exists, "the compiler's process")
    process.signal(signal.SIGTERM)
    process.end(10)

    child = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(child, 0)
            time.sleep(0.1)
    assert "stopped on request" in process.err


def test_an_unknown_option_is_named():
    pytest.importorskip("libtpu", reason="pip install 'gpt_jax[plan]'")
    words = r"config\.compute\.compiler_options: .*xla_no_such_option"
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=4"]
    with pytest.raises(UsageError, match=words):
        run_plan("tiny", "v5e:2x2", "--compile", "--option=xla_no_such_option=1", *mesh)


def test_a_step_compiled_for_a_pod_that_is_not_here(capsys):
    pytest.importorskip("libtpu", reason="pip install 'gpt_jax[plan]'")
    overrides = ["mesh.data=1", "mesh.fsdp=4", "compute.dtype=bfloat16"]
    words = [f"--config.{override}" for override in overrides]
    run_plan("tiny", "v5e:2x2", "--compile", "--json", *words)
    report = read_plan(capsys)
    assert report["fits"]
    assert report["compiled"]["peak"] > report["compiled"]["argument"] > 0
    assert report["compiled"]["program"]["collectives"]
    assert report["schedule"]["by_cycles"]
