"""A card: each check holds on a tiny row, and each fails when what it looks at is broken."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs

from gpt_jax import config as configs, interop
from gpt_jax.card import (
    CHECKS,
    fits,
    foreign,
    format_page,
    format_summary,
    inference,
    make_card,
    meshes,
    open_subject,
    to_data,
    training,
)
from gpt_jax.card.finding import FAIL, NOT_CHECKED, PASS, CannotCheckError, Result
from gpt_jax.card.reference import Reference
from gpt_jax.commands.config_file import load_config
from gpt_jax.errors import UsageError

TINY = f"{runs.ROOT}/configs/tiny.py"
EXTRAS = {"harness": "lm_eval", "reference": "torch"}
FEW_MESHES = {name: meshes.MESHES[name] for name in ("fsdp 8", "pipeline 2, fsdp 4")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a subject, its card), made once with few meshes and one machine."""
    folder = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch, runs.own_signals():
        patch.setattr(meshes, "MESHES", FEW_MESHES)
        patch.setattr(fits, "MACHINES", ("h100:1",))
        subject = open_subject("tiny", load_config(TINY, []), folder, lambda line: None)
        yield subject, make_card(subject, "2026-01-02")


def find(card, name):
    return next(finding for finding in card.findings if finding.name == name)


def test_every_check_passes_or_says_what_is_missing(made):
    _, card = made
    assert [finding.name for finding in card.findings] == list(CHECKS)
    for name, verdict, figure, how in card.findings:
        if verdict == NOT_CHECKED and name in EXTRAS:
            assert EXTRAS[name] in figure and "install" in figure
            continue
        assert verdict == PASS, (name, figure)
        assert how.endswith(".")
    assert "4 of 4 losses" in find(card, "resumes").figure
    assert "2 meshes" in find(card, "meshes").figure
    assert "family gpt2" in find(card, "exports").figure
    assert "h100:1" in find(card, "fits").figure


def break_training(patch, subject):
    def step(state, batch, frozen=None):
        state, sums = subject.parts.train_step(state, batch, frozen)
        worse = jax.tree.map(lambda x: x * 1.5, state.params)
        return state._replace(params=worse), sums

    return subject._replace(parts=subject.parts._replace(train_step=step))


def break_reshard(patch, subject):
    read = training.read_state

    def read_wrongly(folder, step, abstract):
        state = read(folder, step, abstract)
        path = next(path for path in state if "table" in path)
        is_split = abstract.params["embed"]["table"].sharding.mesh.size > 1
        return state | ({path: state[path] + 1} if is_split else {})

    patch.setattr(training, "read_state", read_wrongly)
    return subject


def break_meshes(patch, subject):
    make = meshes.make_mesh_config

    def make_other(subject, shape):
        config = make(subject, shape)
        return replace(config, model=replace(config.model, norm_epsilon=0.01))

    patch.setattr(meshes, "make_mesh_config", make_other)
    return subject


def break_decoding(patch, subject):
    """Each token is told the place before its own."""
    patch.setattr(inference, "jnp", SimpleNamespace(**vars(inference.jnp)))
    full = inference.jnp.full
    patch.setattr(inference.jnp, "full", lambda shape, value: full(shape, max(value - 1, 0)))
    return subject


def break_scores(patch, subject):
    score = inference.score_requests

    def score_wrongly(*given):
        return [one._replace(total=one.total - 0.01) for one in score(*given)]

    patch.setattr(inference, "score_requests", score_wrongly)
    return subject


def break_exports(patch, subject):
    opened = interop.open_foreign

    def open_wrongly(*given, **more):
        origin = opened(*given, **more)
        return origin._replace(read=lambda path, index: origin.read(path, index) * 1.001)

    patch.setattr(foreign.interop, "open_foreign", open_wrongly)
    return subject


def break_fits(patch, subject):
    patch.setattr(fits, "MACHINES", ("v5e:1x1",))
    row = load_config(f"{runs.ROOT}/configs/llama.py:70b", [])
    return subject._replace(row=configs.resolve(row))


BREAKS = {
    "trains": break_training,
    "resumes": break_training,
    "reshards": break_reshard,
    "meshes": break_meshes,
    "decodes": break_decoding,
    "scores": break_scores,
    "exports": break_exports,
    "fits": break_fits,
}


def move(subject, folder, has_run=True):
    """The subject in a new folder, with the run of the old one or without."""
    if has_run:
        (folder / "run").symlink_to(subject.workdir)
    return subject._replace(folder=folder)


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_piece_is_a_fail(made, monkeypatch, tmp_path, name):
    subject = move(made[0], tmp_path, name != "trains")
    monkeypatch.setattr(meshes, "MESHES", {"fsdp 8": {"fsdp": 8}})
    subject = BREAKS[name](monkeypatch, subject)
    with runs.own_signals():
        [finding] = make_card(subject, "2026-01-02", [name]).findings
    assert (finding.name, finding.verdict) == (name, FAIL), finding.figure


def test_the_extras_compare_with_others(made, monkeypatch, tmp_path):
    """An answer that differs from the plain sum, and logits that differ, are fails."""
    subject = move(made[0], tmp_path)
    plain = inference.add_up
    monkeypatch.setattr(inference, "add_up", lambda *given: (plain(*given)[0] + 1, True))
    nest = foreign.nest
    monkeypatch.setattr(foreign, "nest", lambda params: jax.tree.map(lambda x: x * 2, nest(params)))
    for finding in make_card(subject, "2026-01-02", list(EXTRAS)).findings:
        wanted = FAIL
        if find(made[1], finding.name).verdict == NOT_CHECKED:
            wanted = NOT_CHECKED
        assert finding.verdict == wanted, finding


def answer(subject, add: float) -> dict:
    """The samples of the harness as its log has them, with `add` on every log-probability."""
    model, compute = inference.prepare(subject)
    tokenizer = subject.parts.data.tokenizer
    params = inference.load_weights(subject)
    samples = []
    for question in inference.QUESTIONS:
        texts = [(question["q"], choice) for choice in question["choices"]]
        requests = inference.encode_pairs(tokenizer, texts)
        with jax.set_mesh(subject.parts.mesh):
            scores = inference.score_requests(model, compute, params, requests, print)
        resps = [[(score.total + add, score.is_greedy)] for score in scores]
        samples.append({"arguments": texts, "resps": resps})
    return {"samples": {inference.TASK: samples}}


@pytest.mark.parametrize(
    "add, verdict", [pytest.param(0.0, PASS, marks=pytest.mark.deep), (0.1, FAIL), (math.nan, FAIL)]
)
def test_answers_of_the_harness_are_compared(made, monkeypatch, tmp_path, add, verdict):
    """Its package need not be installed."""
    subject = move(made[0], tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace())
    monkeypatch.setattr(inference, "run_tasks", lambda *given: answer(subject, add))
    [finding] = make_card(subject, "2026-01-02", ["harness"]).findings
    assert finding.verdict == verdict, finding


@pytest.mark.parametrize(
    "change, verdict",
    [
        pytest.param(1.0, PASS, marks=pytest.mark.deep),
        (1.01, FAIL),
        pytest.param(math.nan, FAIL, marks=pytest.mark.deep),
    ],
)
def test_the_gradients_of_a_reference_are_compared(made, monkeypatch, tmp_path, change, verdict):
    """One that computes as we do stands in for transformers. Its last gradient is changed."""
    subject = move(made[0], tmp_path)

    def compute_reference(directory, ids, target):
        origin = interop.open_foreign(directory, tokenizer="bytes")
        params = foreign.read_params(origin)
        logits, grads = foreign.compute_ours(subject, origin.model, params, ids)
        last = list(grads)[-1]
        grads = grads | {last: grads[last] * change}
        changed = origin._replace(read=lambda path, index: grads[path][index])
        interop.write_directory(changed, target, meet_nonfinite=print)
        return Reference("stand-in", "0", logits, target)

    monkeypatch.setattr(foreign, "compute_reference", compute_reference)
    [finding] = make_card(subject, "2026-01-02", ["reference"]).findings
    assert finding.verdict == verdict, finding


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_that_is_missing_is_no_pass(made, monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, EXTRAS[name], None)
    [finding] = make_card(move(made[0], tmp_path), "2026-01-02", [name]).findings
    assert finding.verdict == NOT_CHECKED and EXTRAS[name] in finding.figure


def test_without_trained_weights_nothing_else_is_checked(made, tmp_path):
    subject = move(made[0], tmp_path, has_run=False)
    names = [name for name in CHECKS if name not in ("trains", "fits", "harness")]
    for finding in make_card(subject, "2026-01-02", names).findings:
        assert finding.verdict == NOT_CHECKED and "does not train" in finding.figure


def test_an_error_in_a_check_is_its_fail(made, monkeypatch, tmp_path):
    def fail(subject):
        raise KeyError("nothing there")

    monkeypatch.setitem(CHECKS, "scores", CHECKS["scores"]._replace(run=fail))
    monkeypatch.setitem(
        CHECKS, "decodes", CHECKS["decodes"]._replace(run=lambda subject: Result(True, "fine"))
    )
    card = make_card(move(made[0], tmp_path), "2026-01-02", ["decodes", "scores"])
    assert [finding.verdict for finding in card.findings] == [PASS, FAIL]
    assert "KeyError" in card.findings[1].figure and "nothing there" in card.findings[1].figure


def test_a_gradient_that_is_nan_differs():
    """Also the last one, which a plain max would pass over."""
    ours = {"a": np.ones(2), "b": np.ones(2)}
    assert meshes.compare_gradients(ours, ours) == 0
    assert meshes.compare_gradients(ours, ours | {"b": ours["b"] * math.nan}) == math.inf
    assert meshes.compare_gradients(ours | {"b": ours["b"] * math.nan}, ours) == math.inf


def test_too_few_devices(made, monkeypatch):
    monkeypatch.setattr(meshes, "DEVICES", 99)
    with pytest.raises(CannotCheckError, match=r"needs 99 devices.*--cpu_devices=99"):
        meshes.check_meshes(made[0])


def test_a_mesh_that_the_row_itself_refuses(made):
    """The tiny shape would take it."""
    subject = made[0]
    row = replace(subject.row, model=replace(subject.row.model, vocab=263))
    shape = dict.fromkeys(configs.AXES, 1) | {"tensor": 2, "fsdp": 4}
    assert meshes.find_fault(subject, shape) == ""
    assert "config.model.vocab = 263" in meshes.find_fault(subject._replace(row=row), shape)


def test_a_model_without_a_family():
    row = configs.resolve(load_config(f"{runs.ROOT}/configs/modern.py:d12", []))
    with pytest.raises(UsageError) as error:
        interop.write_config(row.model)
    line = foreign.explain_no_family(error.value)
    assert line.startswith("no foreign family holds it; the nearest is ")
    assert "smear" in line and "config.model" not in line


def test_pages(made):
    data = json.loads(json.dumps(to_data(made[1])))
    page = format_page(data)
    assert "| train.batch_size | 8 | 16 |" in page
    for finding in data["findings"]:
        assert f"| {finding['name']} | {finding['verdict']} | " in page
        assert f"- **{finding['name']}**: {finding['how']}" in page
        assert finding["date"] == "2026-01-02"

    data["findings"][0] |= {"verdict": FAIL, "figure": "a | b"}
    assert "| trains | FAIL | a \\| b | 2026-01-02 |" in format_page(data)
    row = format_summary([data], "cards").splitlines()[-1]
    assert row.startswith("| [tiny](cards/tiny.md) | FAIL | pass | ")


def test_a_checkpoint_is_checked_with_its_own_weights(made, call):
    """The run starts where the other has ended."""
    given = ("--checks", "trains", "--json", "--cpu_devices=0")
    out, _ = call("card", f"--checkpoint={made[0].workdir}", *given)
    data = json.loads(out)
    assert data["weights"] == "the checkpoint's"
    first = float(data["findings"][0]["figure"].split()[1])
    losses = training.read_losses(made[0].workdir)
    assert first < losses[1] - 0.5


@pytest.mark.parametrize(
    "given, words",
    [
        ([], ["--config", "--checkpoint", "required"]),
        (["--config=a.py", "--checkpoint=b"], ["not allowed with"]),
        (["--config=none.py"], ["none.py", "no such file"]),
        (["--config=a.py", "--step=3"], ["--step=3", "is for --checkpoint"]),
        (["--checkpoint=b", "--config.model.layers=2"], ["--config.model.layers=2", "its own"]),
        ([f"--config={TINY}", "--checks", "flies"], ["--checks=flies", "trains, resumes"]),
        ([f"--config={TINY}", "--out=no/such/place.md"], ["--out=no/such/place.md", "a folder"]),
        ([f"--config={TINY}", "--config.model.wings=2"], ["config.model.wings"]),
        ([f"--config={TINY}", "--distributed"], ["one process"]),
        (["--checkpoint=no/such/run"], ["no/such/run"]),
    ],
)
def test_bad_input_is_one_line(given, words):
    code, line = runs.refusal("card", "--cpu_devices=0", *given)
    assert code == 2
    assert [word for word in words if word not in line] == []


def test_a_fail_ends_the_command(made, monkeypatch, tmp_path):
    """The page is written all the same."""
    monkeypatch.setattr(fits, "MACHINES", ("v5e:1x1",))
    out = tmp_path / "card.md"
    given = ("--checks", "fits", "--cpu_devices=0", f"--out={out}")
    spec = f"--config={runs.ROOT}/configs/llama.py:70b"
    code, line = runs.refusal("card", spec, *given)
    assert (code, "fails fits" in line) == (2, True)
    assert "| fits | FAIL | not on v5e:1x1 |" in out.read_text()
