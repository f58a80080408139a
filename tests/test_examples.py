"""The programs in examples/ do what they say, on few steps."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import model as models, run
from gpt_jax.train import OBJECTIVES

FOLDER = Path(__file__).resolve().parents[1] / "examples"


def load_example(name: str):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """The workdir that examples/train.py leaves after 12 steps, and its output."""
    folder = tmp_path_factory.mktemp("run")
    folder.joinpath("texts").write_text(repr(load_example("train").main(str(folder), steps=12)))
    return folder


def test_train(workdir):
    first, second = eval((workdir / "texts").read_text())
    assert first != second
    assert (workdir / "report.html").exists()


def test_look_inside(workdir):
    """The last layer gives what the model itself says, and the first does not."""
    example = load_example("look_inside")
    rows = example.look(str(workdir), "The run")
    assert len(rows) == 2
    assert rows[0][1] > 1e-4 and rows[1][1] == 0

    loaded = run.load_model(str(workdir), 0, lambda line: None, devices=1)
    network = models.Transformer(loaded.config.model, loaded.config.compute)
    tokens = jnp.asarray([loaded.tokenizer.encode("The run")])
    with jax.set_mesh(loaded.mesh):
        streams = example.residual_streams(network, loaded.params, tokens)
        ours = example.read_out(network, loaded.params, streams[-1])
        theirs = network.apply({"params": loaded.params}, {"tokens": tokens})
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_choose(workdir):
    """Both roads to a score agree: the sum of a text's surprise, and its continuation's score."""
    example = load_example("choose")
    rows = example.choose(str(workdir), "The run ", ["is", "then is"])
    assert [choice for *_, choice in rows] == ["is", "then is"]  # the shorter one is likelier
    surprise = example.find_surprise(str(workdir), "The run then is")
    assert "".join(token for _, token in surprise) == "he run then is"
    # The space at the end of the context counts to its continuation.
    expected = sum(score for score, _ in surprise[-len(" then is") :])
    assert rows[1][0] == pytest.approx(expected, abs=1e-3)
    assert rows[1][1] == pytest.approx(expected / len("then is"), abs=1e-3)


def test_own_dataset():
    """Batches can be made again, the answers are right, and the loss falls."""
    example = load_example("own_dataset")
    batch = example.make_batch(3)
    assert (batch["targets"] == example.make_batch(3)["targets"]).all()
    for tokens, weight in zip(batch["tokens"], batch["weight"], strict=True):
        question, answer = "".join(example.SIGNS[i] for i in tokens).split("=")
        a, b = question.split("+")
        assert int(a) + int(b) == int(answer.rstrip("."))
        assert weight.sum() == len(answer.rstrip(".")) + 1
    accuracy = example.main(steps=40)
    assert np.mean(accuracy[-5:]) > np.mean(accuracy[:5]) + 0.1


def test_own_objective(monkeypatch):
    """The focal loss is below the loss where something is easy, and never above it."""
    monkeypatch.setitem(OBJECTIVES, "focal", None)  # so that the table is put back afterwards
    history = load_example("own_objective").main(steps=20)
    assert all(row["objective"] < row["loss"] for row in history)
    assert history[-1]["loss"] < history[0]["loss"] - 0.5


def test_own_architecture():
    """The recurrence by an associative scan equals the one by a loop, and the model learns."""
    example = load_example("own_architecture")
    params = example.init_params(jax.random.key(0), vocab=7)["layers"]["0"]
    x = jax.random.normal(jax.random.key(1), (1, 5, example.WIDTH))
    gate, value, output = np.split(np.asarray(x @ params["in"])[0], 3, axis=-1)
    keep, state, rows = 1 / (1 + np.exp(-(gate + 2))), 0.0, []
    for t in range(5):
        state = keep[t] * state + (1 - keep[t]) * value[t]
        rows.append(state * output[t] / (1 + np.exp(-output[t])))
    expected = np.stack(rows) @ np.asarray(params["out"])
    np.testing.assert_allclose(example.recur(params, x)[0], expected, rtol=2e-4, atol=2e-5)

    losses = example.main(steps=20)
    assert losses[-1] < losses[0] - 1.0
