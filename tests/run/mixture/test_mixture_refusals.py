"""Mixtures that cannot run are refused, and so are those that processes count differently."""

from dataclasses import replace

import jax
import pytest
import runs
from mixtures import arguments

from gpt_jax.data.stream import dataset, mixture
from gpt_jax.errors import UsageError
from gpt_jax.run import agreement
from gpt_jax.sharding.mesh import make_mesh


@pytest.mark.parametrize(
    "change, code, words",
    [
        ("--config.data.sources=(('wiki','{both}',0.0),('books','{both}',0.0))", 2, "not all 0"),
        (
            "--config.data.sources=(('wiki','{both}',1.0),('books','{both}',1.0),('poems','{both}',1.0))",
            2,
            "holds several sources; name one of wiki, books",
        ),
        (
            "--config.data.sources=(('wiki','{both}',1.0),('wiki','{both}',1.0))",
            2,
            "wiki is named twice",
        ),
        ("--config.data.tokenizer=bpe:300+fim", 2, "is tokenized by bytes+fim"),
        ("--config.data.path={both}", 2, "give one of them"),
        ("--config.train.batch_size=2400", 2, "less than a batch"),
        ("--config.data.phases=((4000,(1.0,)),)", 2, "expected 3 weights, for wiki, books, chat"),
        ("--config.data.eval_path={both}", 2, "each holds out its own text"),
        # before anything is read:
        (
            "--config.data.sources=(('a','none.txt',-1.0),('b','none.txt',1.0))",
            2,
            "the weights (-1.0, 1.0) must be 0 or more",
        ),
        (
            "--config.data.sources=(('a','none.txt',1.0),('b','none.txt',1.0))",
            2,
            "config.data.phases[0] = (0.2, 0.2, 0.6)",
        ),
        (
            "--config.data.sources=(('a','none.txt',1.0),('b','none.txt',1.0),('c','none.txt',1.0))",
            2,
            "config.data.sources[0] = 'none.txt': no such file",
        ),
        (
            "--config.data.tokenizer=bpe:300+chat",
            2,
            "config.data.fim = 0.3: the tokenizer bpe:300+chat has no <|fim_prefix|>",
        ),
    ],
)
def test_mixtures_that_cannot_run(folder, tmp_path, change, code, words):
    ending, line = runs.refusal(
        *arguments(folder, tmp_path / "run"), change.format(both=folder / "both")
    )
    assert (ending, words in line, "\n" in line) == (code, True, False), line


@pytest.mark.parametrize(
    "change, words",
    [
        ("--config.data.block=2", "less than one example of a block"),
        ("--config.train.batch_size=2400", "less than a batch"),
        (
            "--config.data.phases=((1,(1.0,1.0,1.0)),(2,(1.0,1.0,1.0)))",
            "config.data.phases[1] begins at token 2, within",
        ),
    ],
)
def test_rows_that_cannot_be_are_refused_before_the_model_is_made(
    folder, tmp_path, monkeypatch, change, words
):
    monkeypatch.setattr("gpt_jax.run.parts.make_steps", lambda *_: pytest.fail("it was made"))
    code, line = runs.refusal(*arguments(folder, tmp_path / "run", change))
    assert code == 2 and words in line, line


def test_counts_of_the_mixture_are_compared_between_processes(folder, tmp_path, monkeypatch):
    """Each process computes them from floats by itself.

    A process that rounds differently must be named, and nothing may be trained.
    """
    config = runs.configs.resolve(runs.load(folder, *arguments(folder, tmp_path)[3:]))
    data, facts = dataset.load_dataset(config.data, lambda line: None), []
    mesh = make_mesh({}, jax.devices()[:1])
    monkeypatch.setattr(agreement, "find_disagreements", lambda found: facts.append(found) or [])
    agreement.agree_on_job(config, mesh, data)
    counts, begins = facts[0]["the mixture's counts"]
    # Blocks of 20 rows; token 4,000 is row 125 of 32 tokens, before which 5 are left.
    assert (
        [sum(row) for row in counts] == [20, 5, 20]
        and begins == [0, 120, 125]
        and isinstance(counts[0][0], int)
    )
    apportion = mixture.apportion
    monkeypatch.setattr(mixture, "apportion", lambda *given: apportion(*given)[[1, 0, 2]])
    agreement.agree_on_job(config, mesh, dataset.load_dataset(config.data, lambda line: None))
    assert facts[1]["the mixture's counts"] != facts[0]["the mixture's counts"]
    with pytest.raises(UsageError, match="at least one row later"):  # told to the others first
        close = ((1, (1.0, 1.0, 1.0)), (2, (1.0, 1.0, 1.0)))
        wrong = replace(config, data=replace(config.data, phases=close))
        agreement.agree_on_job(wrong, mesh, data)
    assert "one row later" in facts[2]["the mixture's counts"]
    monkeypatch.setattr(
        agreement, "find_disagreements", lambda found: [name for name in found if "mixture" in name]
    )
    with pytest.raises(UsageError, match="the mixture's counts: not the same on all processes"):
        agreement.agree_on_job(config, mesh, data)
