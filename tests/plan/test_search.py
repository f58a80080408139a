"""What a search tries and chooses, and what is advised where a config does not fit."""

import itertools
import shlex
from dataclasses import replace

import pytest
from plans import changed, job_of, llama, spec_of

from gpt_jax import config as configs
from gpt_jax.commands.config_file import load_config
from gpt_jax.plan import advice, search
from gpt_jax.plan.command_line import CommandLine, choose_overrides, format_command
from gpt_jax.plan.estimate import estimate_job, find_problems
from gpt_jax.plan.memory import estimate_memory
from gpt_jax.plan.topology import parse_topology
from gpt_jax.plan.trial import try_candidates
from gpt_jax.plan.wording import format_verdict


def test_heads_that_do_not_divide_are_named():
    job = changed(llama(), mesh=dict(fsdp=1, tensor=16, data=-1))
    shape, problems = find_problems(job.config, 64)
    assert shape["data"] == 4
    (problem,) = problems
    words = "config.model.kv_heads = 8: must be divisible by config.mesh.tensor = 16"
    assert words in problem


def test_a_matmul_of_experts_that_a_machine_lacks_is_a_problem():
    job = changed(job_of("moe:8x7b"), compute=dict(expert_matmul="grouped"))
    problems = {
        name: estimate_job(job, parse_topology(name)).problems for name in ("h100:8", "v5p:4x4x4")
    }
    assert not any("expert_matmul" in problem for problem in problems["h100:8"])
    assert (
        "config.compute.expert_matmul = 'grouped': TPU v5 does not have it; "
        "choose auto or sorted" in problems["v5p:4x4x4"]
    )


def test_every_problem_is_named():
    job = changed(
        llama(), mesh=dict(fsdp=-1), train=dict(batch_size=100, seq_len=8200), model=dict(heads=31)
    )
    _, problems = find_problems(job.config, 64)
    assert [line.split(" ")[0] for line in problems] == [
        "config.model.kv_heads",
        "config.train.loss_chunk",
        "config.train.batch_size",
        "config.train.batch_size",
    ]


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


def test_each_mesh_is_tried_once():
    job = llama("--config.mesh.zero=1")
    meshes = list(search.generate_meshes(job.config, parse_topology("v5p:4x4x4")))
    assert len({*meshes}) == len(meshes)
    # With no axis that cuts the weights, zero=3 is the same mesh.
    assert configs.Mesh(data=8, tensor=8, zero=1) in meshes
    assert configs.Mesh(data=8, tensor=8, zero=3) not in meshes


def test_a_search_tries_few_of_the_accumulations(monkeypatch):
    """It finds the first that fits, as trying all of them in turn would."""
    machine = parse_topology("v5e:4x4")
    job = changed(llama(), mesh=dict(fsdp=-1), train=dict(batch_size=3 * 2**16))
    mesh = configs.Mesh(data=1, fsdp=16)
    variants = next(search.generate_variants(job.config, mesh))
    peaks = [estimate_job(job._replace(config=one), machine).memory.peak for one in variants]

    tries = []

    def count_try(*args):
        tries.append(args)
        return estimate_memory(*args)

    monkeypatch.setattr(search, "estimate_memory", count_try)
    for limit in (*peaks, 0.99 * min(peaks)):
        tries.clear()
        candidate = search._find_first_fit(job, machine, variants, limit)
        fits = [one for one, peak in zip(variants, peaks, strict=True) if peak <= limit]
        assert (candidate.config if candidate else None) == (fits[0] if fits else None)
        assert len(tries) <= 2 + len(variants).bit_length() < len(variants) / 2


def test_weights_kept_whole_are_offered_to_be_cut():
    job = llama("--config.mesh.zero=1")
    machine = parse_topology("v5p:4x4x4")
    assert not estimate_job(job, machine).fits
    first, *_ = advice.find_advice(job, machine)
    assert "--config.mesh.zero=3" in search.list_overrides(job.config, first.config)


def test_advice_fits():
    machine = parse_topology("v5e:4x4")
    job = changed(
        llama(),
        mesh=dict(fsdp=-1),
        train=dict(accumulate=1, batch_size=512),
        eval=dict(batch_size=512),
    )
    estimate = estimate_job(job, machine)
    assert not estimate.fits
    assert format_verdict(estimate.memory.peak, machine).startswith("does not fit: peak ")

    offers = advice.find_advice(job, machine)
    assert offers
    for config, _ in offers:
        values = configs.to_dict(job.config)
        for text in search.list_overrides(job.config, config):
            configs.override(values, *text.removeprefix("--config.").split("=", 1))
        again = configs.resolve(configs.from_dict(values))
        estimate = estimate_job(job._replace(config=again), machine)
        assert estimate.fits and not estimate.problems


@pytest.mark.parametrize("over", [1.2, 0])  # Measured; refused without a number.
def test_advice_learns_from_what_the_compiler_refused(over):
    """Nothing that the arithmetic has above the refused config's place is offered."""
    machine = parse_topology("v5e:4x4")
    job = job_of("llama:1b")
    config, estimate = search.search_meshes(job, machine)[0]
    job = job._replace(config=config)
    peak = estimate.memory.peak
    limit = advice.lower_limit(machine, [(peak, over * machine.chip.memory)])
    offers = advice.find_advice(job, machine, limit)
    assert offers
    assert max(offer.estimate.memory.peak for offer in offers) <= limit < peak


def test_advice_is_never_the_config_itself():
    machine = parse_topology("v5e:4x4")
    job = job_of("llama:1b")
    job = job._replace(config=search.search_meshes(job, machine)[0].config)
    offers = advice.find_advice(job, machine, count=99)
    assert all(search.list_overrides(job.config, offer.config) for offer in offers)
    assert advice.lower_limit(machine, []) == search.MARGIN * machine.chip.memory


def make_refusal(words):
    return {"seconds": 1, "peak": 0, "refusal": words}


def test_a_refusal_rules_out_what_needs_as_much():
    machine = parse_topology("v5e:4x4")
    job = job_of("llama:1b")
    candidates = search.search_meshes(job, machine)
    trials = try_candidates(
        job, machine, candidates, lambda config: make_refusal("RESOURCE_EXHAUSTED"), wanted=1
    )
    assert 1 < len(trials) <= 4
    peaks = [trial.estimate.memory.peak for trial in trials]
    assert all(later < search.CLOSE * peak for peak, later in itertools.pairwise(peaks))


def test_a_fault_of_the_compiler_ends_a_search():
    machine = parse_topology("v5e:4x4")
    job = job_of("llama:1b")
    candidates = search.search_meshes(job, machine)
    trials = try_candidates(
        job, machine, candidates, lambda config: make_refusal("INTERNAL: a fault"), wanted=3
    )
    assert len(trials) == 1


def test_the_winning_command_is_one_for_a_shell():
    """`train` reads it back as the config that won."""
    overrides = [
        "--config.data.path=a text.txt,$(date).txt",
        "--config.compute.compiler_options=('a=1,2', 'b=x')",
    ]
    spec = spec_of("llama:1b")
    base = configs.resolve(load_config(spec, overrides))
    best = replace(
        base, mesh=replace(base.mesh, fsdp=16, data=1), train=replace(base.train, accumulate=2)
    )
    line = CommandLine(spec, overrides, load_config(spec, overrides))
    changes, replaced = choose_overrides(line, best)
    assert replaced == []

    words = shlex.split(format_command(spec, changes))
    assert words[:4] == ["gpt-jax", "train", f"--config={spec}", "--workdir=runs/llama-1b"]
    assert configs.resolve(load_config(spec, words[4:])) == best


@pytest.mark.parametrize("names", [("attention",), ("q", "k", "v", "attention")])
def test_names_that_win_are_written_with_commas(names):
    spec = spec_of("llama:1b")
    base = configs.resolve(load_config(spec, []))
    named = replace(base.compute, remat="names", remat_save=names)
    overrides = search.list_overrides(base, replace(base, compute=named))
    assert f"--config.compute.remat_save={','.join(names)}" in overrides
    assert configs.resolve(load_config(spec, overrides)).compute == named


def test_a_search_keeps_attention_where_the_memory_has_room(monkeypatch):
    """Between `block`, which leaves memory free, and `dots`, which does not fit."""
    machine = parse_topology("v6e:16x16")
    job = changed(llama(), mesh=dict(fsdp=-1))
    monkeypatch.setattr(search, "generate_meshes", lambda *_: [configs.Mesh(data=2, fsdp=128)])

    best, *_ = search.search_meshes(job, machine)
    assert best.config.compute.remat_save == ("q", "k", "v", "attention")
    monkeypatch.setattr(search, "KEPT", ())
    plain, *_ = search.search_meshes(job, machine)
    assert plain.config.compute.remat == "block"
    assert best.estimate.step < 0.95 * plain.estimate.step
    assert plain.estimate.memory.peak < best.estimate.memory.peak < machine.chip.memory
