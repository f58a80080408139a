"""What `gpt-jax plan` says: verdicts, advice, the best mesh, and the command that trains it."""

import json
import os
import shlex
import signal
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import runs
from plans import CONFIGS, changed, job_of, llama

from gpt_jax import config as configs
from gpt_jax.commands import compiling, config_file, plan as command
from gpt_jax.errors import UsageError
from gpt_jax.plan import memory, report, roofline, search, topology


def test_every_problem_is_named():
    shape, found = roofline.find_problems(
        changed(llama(), mesh=dict(fsdp=1, tensor=16, data=-1)).config, 64
    )
    assert shape["data"] == 4
    assert (
        len(found) == 1
        and "config.model.kv_heads = 8: must be divisible by config.mesh.tensor = 16" in found[0]
    )
    job = changed(
        llama(), mesh=dict(fsdp=-1), train=dict(batch_size=100, seq_len=8200), model=dict(heads=31)
    )
    _, found = roofline.find_problems(job.config, 64)
    assert [line.split(" ")[0] for line in found] == [
        "config.model.kv_heads",
        "config.train.loss_chunk",
        "config.train.batch_size",
        "config.train.batch_size",
    ]


MOE = f"{CONFIGS / 'moe.py'}:8x7b"


@pytest.mark.parametrize(
    "given, words",
    [
        (
            "experts_per_token=9",
            "config.model.experts_per_token = 9: is more than config.model.experts = 8",
        ),
        (
            "heads=7",
            "config.model.heads = 7: does not divide .*; and config.model.kv_heads = 8: must divide",
        ),
        ("kv_heads=3", "config.model.kv_heads = 3: must divide"),
        ("windows=()", "config.model.windows = .*: needs at least one"),
        ("pattern=()", "config.model.pattern = .*: needs at least one"),
    ],
)
def test_a_model_that_is_none_is_refused_before_it_is_traced(given, words):
    with pytest.raises(UsageError, match=f"^{words}"):
        command.main(["--config", MOE, "--topology=v5p:4x4x4", f"--config.model.{given}"])


def test_only_meshes_that_run_are_offered():
    with pytest.raises(
        UsageError, match="^config.mesh.pipeline = 4: 4 does not match 16 devices"
    ) as error:
        command.main(
            [
                "--config",
                f"{CONFIGS / 'modern.py'}:d4",
                "--topology=v5e:4x4",
                "--config.mesh.fsdp=1",
                "--config.mesh.pipeline=4",
            ]
        )  # it has two pairs of layers
    _, _, offers = str(error.value).partition("the nearest that do: ")
    assert "config.mesh.fsdp=8 config.mesh.pipeline=2" in offers and "pipeline=16" not in offers


def test_tokens_beyond_a_capacity_are_no_work_done():
    """A factor of 0.1 multiplies a tenth of the choices, and counts a tenth of them."""
    machine, mfu = topology.parse_topology("v5p:4x4x4"), {}
    for factor in (0.1, 1.0):
        job = job_of(
            "moe:8x7b",
            "--config.model.dispatch=capacity",
            f"--config.model.capacity_factor={factor}",
        )
        mfu[factor] = roofline.estimate_job(job, machine).mfu_full
    assert 0 < mfu[0.1] < mfu[1.0] < 1


def test_weights_kept_whole_are_offered_to_be_cut():
    job, machine = llama("--config.mesh.zero=1"), topology.parse_topology("v5p:4x4x4")
    assert not roofline.estimate_job(job, machine).fits
    first, *_ = search.find_advice(job, machine)
    assert "--config.mesh.zero=3" in search.list_overrides(job.config, first.config)
    found = list(search.meshes(job.config, machine))
    assert len({*found}) == len(found) and configs.Mesh(data=8, tensor=8, zero=1) in found
    assert configs.Mesh(data=8, tensor=8, zero=3) not in found  # which is the same


def test_what_does_not_fit_is_told_what_would():
    machine = topology.parse_topology("v5e:4x4")
    job = changed(
        llama(),
        mesh=dict(fsdp=-1),
        train=dict(accumulate=1, batch_size=512),
        eval=dict(batch_size=512),
    )
    seen = roofline.estimate_job(job, machine)
    assert not seen.fits and roofline.format_verdict(seen.memory.peak, machine).startswith(
        "does not fit: peak "
    )
    offers = search.find_advice(job, machine)
    assert offers
    for config, _ in offers:
        values = configs.to_dict(job.config)
        for text in search.list_overrides(job.config, config):
            configs.override(values, *text.removeprefix("--config.").split("=", 1))
        again = roofline.estimate_job(
            job._replace(config=configs.resolve(configs.from_dict(values))), machine
        )
        assert again.fits and not again.problems


def test_advice_learns_from_what_the_compiler_refused():
    """Nothing that the arithmetic has above the refused config's place; and never that config
    itself."""
    machine, job = topology.parse_topology("v5e:4x4"), job_of("llama:1b")
    config, seen = search.search_meshes(job, machine)[0]
    job = job._replace(config=config)
    for peak in (1.2 * machine.chip.memory, 0):  # measured; refused without a number
        limit = search.lower_limit(machine, [(seen.memory.peak, peak)])
        offers = search.find_advice(job, machine, limit)
        assert offers and all(
            one.estimate.memory.peak <= limit < seen.memory.peak for one in offers
        )
    assert all(
        search.list_overrides(job.config, one.config)
        for one in search.find_advice(job, machine, count=99)
    )
    assert search.lower_limit(machine, []) == search.MARGIN * machine.chip.memory


def test_the_report_does_not_offer_what_was_refused(monkeypatch, capsys):
    """By a compiler that has no memory for what the arithmetic likes best."""
    refused = {"seconds": 1, "refusal": "RESOURCE_EXHAUSTED: out of memory", "peak": 0}
    monkeypatch.setattr(command, "compile_outside", lambda args, rest: refused)
    monkeypatch.setattr(compiling, "_there", lambda name: True)
    job, machine = job_of("llama:1b"), topology.parse_topology("v5e:4x4")
    best = search.list_overrides(job.config, search.search_meshes(job, machine)[0].config)
    given = ["--config", f"{CONFIGS / 'llama.py'}:1b", "--topology=v5e:4x4", "--json", *best]
    with pytest.raises(UsageError, match="RESOURCE_EXHAUSTED"):
        command.main([*given, "--compile"])
    found = json.loads(capsys.readouterr().out)
    assert found["would_fit"] and [] not in found["would_fit"]
    for offer in found["would_fit"]:
        command.main([*given, *offer])
        peak = json.loads(capsys.readouterr().out)["arithmetic"]["memory"]["peak"]
        assert peak < found["arithmetic"]["memory"]["peak"]


PROGRAM = dict(
    collectives=[], cycles=10**9, kernels={}, matmul_flops=0.0, turn_flops=0.0, grouped_flops=0.0
)


@pytest.mark.parametrize("over", [0.5, 2.0])
def test_json_has_one_verdict(over, monkeypatch, capsys):
    """The compiler's where there is one, whatever the arithmetic said; days are those of its
    step, and say so."""
    machine = topology.parse_topology("v5e:4x4")
    done = {
        "seconds": 1,
        "refusal": "",
        "peak": over * machine.chip.memory,
        "program": PROGRAM,
        "argument": 1,
        "output": 1,
        "alias": 1,
        "temporary": 1,
    }
    monkeypatch.setattr(command, "compile_outside", lambda args, rest: done)
    monkeypatch.setattr(compiling, "_there", lambda name: True)
    job = job_of("llama:1b")
    best = search.list_overrides(job.config, search.search_meshes(job, machine)[0].config)
    given = ["--config", f"{CONFIGS / 'llama.py'}:1b", "--topology=v5e:4x4", "--json", *best]
    command.main(given)
    alone = json.loads(capsys.readouterr().out)
    assert (
        alone["fits"]
        and (alone["by"], alone["run"]["by"]) == ("arithmetic", "arithmetic")
        and alone["problems"] == []
    )
    with pytest.raises(UsageError, match="does not fit: peak") if over > 1 else nullcontext():
        command.main([*given, "--compile"])
    found = json.loads(capsys.readouterr().out)
    assert found["arithmetic"] == alone["arithmetic"] and (found["by"], found["run"]["by"]) == (
        "compiler",
        "compiler",
    )
    assert found["fits"] == (over < 1) == found["verdict"].startswith("fits: peak")
    assert found["problems"] == ([] if over < 1 else [found["verdict"]])
    assert found["run"]["days"] == pytest.approx(
        found["schedule"]["step"] * job.config.train.steps / 86_400
    )
    assert "step_seconds" not in found and "memory" not in found


@pytest.mark.parametrize(
    "number, most, want",
    [
        (12, 99, (1, 2, 3, 4, 6, 12)),
        (12, 4, (1, 2, 3, 4)),
        (49, 48, (1, 7)),
        (1, 9, (1,)),
        (10**12, 5, (1, 2, 4, 5)),
    ],
)
def test_divisors(number, most, want):
    assert search.divisors(number, most) == want


def test_a_search_tries_few_of_the_accumulations(monkeypatch):
    """And finds the first that fits, as all of them in turn would."""
    machine, job = (
        topology.parse_topology("v5e:4x4"),
        changed(llama(), mesh=dict(fsdp=-1), train=dict(batch_size=3 * 2**16)),
    )
    several = next(search.variants(job.config, configs.Mesh(data=1, fsdp=16)))
    peaks = [
        roofline.estimate_job(job._replace(config=config), machine).memory.peak
        for config in several
    ]
    tried = []
    monkeypatch.setattr(search, "memory", lambda *given: tried.append(0) or memory.memory(*given))
    for limit in (*peaks, 0.99 * min(peaks)):
        tried.clear()
        found = search._first(job, machine, several, limit)
        want = next((config for config, peak in zip(several, peaks) if peak <= limit), None)
        assert (found and found.config) == want and len(tried) <= 2 + len(
            several
        ).bit_length() < len(several) / 2


@pytest.mark.parametrize(
    "given", [["--config.train.batch_size=1000000000000"], ["--config.model.layers=100000"]]
)
def test_absurd_sizes_are_told_at_once(given, capsys):
    began = time.process_time()
    with pytest.raises(
        UsageError,
        match=r"does not fit: peak|config.model.layers = 100000: a plan takes 512 at most",
    ):
        command.main(["--config", f"{CONFIGS / 'modern.py'}:d4", "--topology=v5p:2x2x2", *given])
    assert time.process_time() - began < 20  # 2 s; hours, before


def test_what_offload_costs_is_not_counted_and_said(capsys):
    given = ["--config", str(CONFIGS / "tiny.py"), "--topology=v5e:2x2", "--config.mesh.data=4"]
    for remat, said in (("block", False), ("offload", True)):
        command.main([*given, f"--config.compute.remat={remat}"])
        assert ("config.compute.remat = 'offload': its copies" in capsys.readouterr().out) == said
    command.main([*given, "--config.compute.remat=offload", "--json"])
    assert "copies to the host" in json.loads(capsys.readouterr().out)["notes"][0]


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "there is no program without --compile"),
        (["--compile"], "cannot be written"),
        (["--compile=2", "--search"], "--search compiles one program after the other"),
    ],
)
def test_a_program_that_cannot_be_kept_is_refused_at_once(more, words, monkeypatch):
    monkeypatch.setattr(command, "compile_outside", None)
    for place in ("/no/such/folder/x.hlo", str(CONFIGS)):
        with pytest.raises(UsageError, match=f"^--keep_hlo={place}: {words}"):
            command.main(
                [
                    "--config",
                    str(CONFIGS / "tiny.py"),
                    "--topology=v5e:2x2",
                    f"--keep_hlo={place}",
                    *more,
                ]
            )


def test_the_winner_of_a_search_reproduces(capsys):
    base = ["--config", f"{CONFIGS / 'llama.py'}:1b", "--topology=v5e:4x4", "--json"]
    command.main([*base, "--search"])
    first = json.loads(capsys.readouterr().out)
    steps = [float(f"{row['step_seconds']:.3g}") for row in first["search"]]
    assert steps == sorted(steps)
    winner = [word for word in shlex.split(first["command"]) if word.startswith("--config.")]
    command.main([*base, *winner])
    again = json.loads(capsys.readouterr().out)
    assert [again[key] for key in ("mesh", "arithmetic")] == [
        first[key] for key in ("mesh", "arithmetic")
    ]
    assert again["fits"]


def test_the_winning_command_is_one_for_a_shell():
    """Read back by `train`'s own eyes it is the config that won."""
    given = [
        "--config.data.path=a text.txt,$(date).txt",
        "--config.compute.compiler_options=('a=1,2', 'b=x')",
    ]
    spec = f"{CONFIGS / 'llama.py'}:1b"
    base = config_file.load_config(spec, given)
    best = replace(
        base, mesh=replace(base.mesh, fsdp=16, data=1), train=replace(base.train, accumulate=2)
    )
    words = shlex.split(report.format_command(spec, [*given, *search.list_overrides(base, best)]))
    assert words[:4] == ["gpt-jax", "train", f"--config={spec}", "--workdir=runs/llama-1b"]
    assert config_file.load_config(spec, words[4:]) == best


def test_options_go_to_the_config(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(command, "plan", lambda args, rest, config, *_: seen.append((rest, config)))
    monkeypatch.setattr(compiling, "_there", lambda name: True)
    command.main(
        [
            "--config",
            str(CONFIGS / "tiny.py"),
            "--topology=v5e:2x2",
            "--compile",
            "--option=a=1",
            "--option=b=x,y",
            "--config.compute.compiler_options=c=2",
        ]
    )
    ((rest, config),) = seen
    assert config.compute.compiler_options == ("c=2", "a=1", "b=x,y")
    assert config_file.load_config(str(CONFIGS / "tiny.py"), rest) == config


def test_an_unknown_option_is_named(capsys):
    pytest.importorskip("libtpu", reason="pip install 'gpt_jax[plan]'")
    with pytest.raises(UsageError, match="config.compute.compiler_options: .*xla_no_such_option"):
        command.main(
            [
                "--config",
                str(CONFIGS / "tiny.py"),
                "--topology=v5e:2x2",
                "--compile",
                "--option=xla_no_such_option=1",
                "--config.mesh.data=1",
                "--config.mesh.fsdp=4",
            ]
        )


def test_the_command_says_no_with_code_2(capsys):
    with pytest.raises(UsageError, match="does not fit: peak"):
        command.main(
            [
                "--config",
                f"{CONFIGS / 'llama.py'}:70b",
                "--topology=h100:8",
                "--config.train.batch_size=8",
                "--config.train.accumulate=1",
                "--config.eval.batch_size=8",
            ]
        )
    assert "problem: does not fit" in capsys.readouterr().out


TOO_SMALL = ["--config", f"{CONFIGS / 'llama.py'}:70b", "--topology=h200:8"]


def test_where_nothing_fits_the_report_says_so(capsys):
    with pytest.raises(UsageError, match="does not fit: peak"):
        command.main(TOO_SMALL)
    *_, problem, last = capsys.readouterr().out.splitlines()
    assert (
        problem.startswith("problem: does not fit")
        and "nothing fits h200:8" in last
        and "take more devices" in last
    )
    with pytest.raises(UsageError, match="--search: nothing fits h200:8"):
        command.main([*TOO_SMALL, "--search", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"] and "take more devices" in found["problems"][0]


def test_where_nothing_runs_the_report_says_so():
    with pytest.raises(
        UsageError,
        match="^--search: no mesh of v5p:16x20x28 runs it; with all devices on fsdp config.model",
    ):
        command.main(
            ["--config", f"{CONFIGS / 'llama.py'}:8b", "--topology=v5p:16x20x28", "--search"]
        )


@pytest.mark.parametrize(
    "given, words",
    [
        (["--search=0"], "--search=0: expected 1 or more"),
        (["--compile=2"], "--compile=2: without --search"),
        (["--config.mesh.tensor=3"], "config.mesh.tensor = 3"),
        (["--config.trian.steps=1"], "config.trian"),
        (["--slices=x"], "argument --slices: invalid int"),
    ],
)
def test_json_also_of_what_cannot_run(given, words, capsys):
    with pytest.raises(UsageError) as error:
        command.main(
            ["--config", f"{CONFIGS / 'llama.py'}:8b", "--topology=v5p:2x2x1", "--json", *given]
        )
    found = json.loads(capsys.readouterr().out)
    assert (
        str(error.value).startswith(words)
        and found["problems"] == [str(error.value)]
        and not found["fits"]
    )


def test_slices_without_sizes_across_them_hold_copies(capsys):
    """As if config.mesh.dcn_data had been given, and it is said."""
    given = [
        "--config",
        f"{CONFIGS / 'llama.py'}:8b",
        "--topology=v5p:4x4x4",
        "--slices=2",
        "--json",
        "--config.train.batch_size=1024",
        "--config.eval.batch_size=128",
    ]
    command.main(given)
    found = json.loads(capsys.readouterr().out)
    assert (
        found["fits"]
        and found["mesh"]["data"] == 2
        and "--config.mesh.dcn_data=2 is taken" in found["notes"][0]
    )
    command.main([*given, "--config.mesh.dcn_data=2"])
    same = json.loads(capsys.readouterr().out)
    assert same.pop("notes") == [] and same == {
        key: value for key, value in found.items() if key != "notes"
    }
    with pytest.raises(UsageError, match="config.mesh.dcn_…: the cross-slice sizes multiply to 4"):
        command.main([*given, "--config.mesh.dcn_fsdp=4", "--config.mesh.fsdp=32"])
    found = json.loads(capsys.readouterr().out)
    assert (
        not found["fits"] and found["verdict"] == found["problems"][0]
    )  # though the memory would do
    assert found["arithmetic"]["verdict"].startswith("fits")


@pytest.mark.parametrize(
    "flag",
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
def test_a_flag_out_of_range_is_named(flag):
    with pytest.raises(UsageError, match=f"^{flag.split()[-1]}: expected"):
        command.main(["--config", str(CONFIGS / "tiny.py"), "--topology=v5e:2x2", *flag.split()])


def test_an_option_of_the_compiler_without_it_is_refused():
    with pytest.raises(UsageError, match="^--option=a=1: is for the compiler; add --compile"):
        command.main(["--config", str(CONFIGS / "tiny.py"), "--topology=v5e:2x2", "--option=a=1"])


def test_what_a_search_replaces_is_said(capsys):
    """And is not in the winner's command, which gives the same plan."""
    given = ["--config", f"{CONFIGS / 'llama.py'}:1b", "--topology=v5e:4x4", "--json"]
    replaced = [
        "--config.mesh.fsdp=7",
        "--config.compute.remat=offload",
        "--config.train.accumulate=2",
    ]
    command.main(
        [
            *given,
            "--search=1",
            *replaced,
            "--config.train.batch_size",
            "64",
            "--config.eval.batch_size=7",
        ]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == [
        *(f"{text}: --search chooses that itself" for text in replaced),
        "--config.eval.batch_size=7: does not divide over the best mesh, and is replaced",
    ]
    words = shlex.split(found["command"])
    keys = [word.partition("=")[0] for word in words]
    assert len(keys) == len({*keys}) and "--config.train.batch_size=64" in words
    command.main([*given, *(word for word in words if word.startswith("--config."))])
    assert json.loads(capsys.readouterr().out)["arithmetic"] == found["arithmetic"]


def test_no_command_is_offered_that_the_compiler_refused(monkeypatch, capsys):
    monkeypatch.setattr(
        command,
        "compile_outside",
        lambda args, rest: {"seconds": 1, "peak": 0, "refusal": "RESOURCE_EXHAUSTED: too much"},
    )
    monkeypatch.setattr(compiling, "_there", lambda name: True)
    with pytest.raises(UsageError, match="RESOURCE_EXHAUSTED"):
        command.main(
            [
                "--config",
                f"{CONFIGS / 'llama.py'}:1b",
                "--topology=v5e:4x4",
                "--search=1",
                "--compile",
                "--json",
            ]
        )
    assert "command" not in json.loads(capsys.readouterr().out)


def test_a_request_to_stop_ends_the_compiler_too(tmp_path):
    """The process that compiles is a child of the command."""
    script = (
        "import sys, time\nfrom gpt_jax.commands import compiling, main\ncompiling._there = lambda name: True\n"
        "sys.executable = sys.argv.pop(1)\nmain.main(sys.argv[1:])\n"
    )
    (tmp_path / "python").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    process = runs.Process(
        tmp_path / "logs",
        [
            str(tmp_path / "python"),
            "plan",
            f"--config={CONFIGS}/tiny.py",
            "--topology=v5e:2x2",
            "--config.mesh.data=4",
            "--compile",
        ],
        ("-c", script),
    )
    process.until((tmp_path / "pid").exists, "the compiler's process")
    process.signal(signal.SIGTERM)
    process.end(10)
    child = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(child, 0)
            time.sleep(0.1)
    assert "stopped on request" in process.err


def test_a_compiler_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(compiling, "_there", lambda name: False)
    for machine, extra in (("v5e:2x2", "plan"), ("h100:8", "plan-gpu")):
        with pytest.raises(UsageError, match=rf"pip install 'gpt_jax\[{extra}\]'"):
            command.main(
                ["--config", str(CONFIGS / "tiny.py"), f"--topology={machine}", "--compile"]
            )


def test_a_step_compiled_for_a_pod_that_is_not_here(capsys):
    pytest.importorskip("libtpu", reason="pip install 'gpt_jax[plan]'")
    command.main(
        [
            "--config",
            str(CONFIGS / "tiny.py"),
            "--topology=v5e:2x2",
            "--compile",
            "--json",
            "--config.mesh.data=1",
            "--config.mesh.fsdp=4",
            "--config.compute.dtype=bfloat16",
        ]
    )
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["compiled"]["peak"] > found["compiled"]["argument"] > 0
    assert found["schedule"]["by_cycles"] and found["compiled"]["program"]["collectives"]
