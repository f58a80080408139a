"""Runs on a mixture of prepared folders.

They are killed and resumed by another number of processes, and their rows are named one by one.
"""

import json
import random
import re
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import runs
from prepared import texts, write_jsonl
from streams import make_stream

from gpt_jax.data.stream import dataset, mixture
from gpt_jax.errors import UsageError
from gpt_jax.run import parts as run_parts
from gpt_jax.sharding.mesh import make_mesh
from gpt_jax.train.checkpoint.manifest import CHECKPOINT_FOLDER, MANIFEST

RUN = (
    "--config.train.steps=24",
    "--config.optim.learning_rate=5e-4",
    "--config.optim.eps=1e-6",
    "--config.checkpoint.every_steps=4",
    "--config.eval.every_steps=12",
    "--config.train.batch_size=24",
    "--config.eval.batch_size=24",
    "--config.data.path=()",
    "--config.data.packing=best_fit",
    "--config.data.document_mask=true",
    "--config.data.shuffle_documents=true",
    "--config.data.fim=0.3",
    "--config.data.block=20",
    "--config.data.phases=((4000,(0.2,0.2,0.6)),)",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three sources in two prepared folders, one of them filtered."""
    root = tmp_path_factory.mktemp("mixture")
    for seed, name in enumerate(("wiki", "books", "chat")):
        rows = texts(150, seed)
        write_jsonl(
            root / f"{name}.jsonl", [text.upper() for text in rows] if name == "chat" else rows
        )
    (root / "both").mkdir()
    runs.call(
        "prepare",
        "--input",
        f"wiki={root / 'wiki.jsonl'}",
        f"books={root / 'books.jsonl'}",
        "--tokenizer=bytes+fim",
        "--eval_fraction=0.1",
        "--workers=1",
        "--filters",
        "min_chars:20",
        f"--output={root / 'both'}",
    )
    runs.call(
        "prepare",
        f"--input={root / 'chat.jsonl'}",
        "--tokenizer=bytes+fim",
        "--eval_fraction=0.1",
        "--workers=1",
        "--dedup=exact",
        f"--output={root / 'chat'}",
    )
    return root


def arguments(folder, workdir, *overrides):
    both, chat = folder / "both", folder / "chat"
    sources = f"(('wiki','{both}',0.5),('books','{both}',0.3),('chat','{chat}',0.2))"
    return [
        "train",
        f"--config={runs.TINY}",
        f"--workdir={workdir}",
        f"--config.data.sources={sources}",
        "--config.data.tokenizer=bytes+fim",
        "--config.log.progress=false",
        *RUN,
        *overrides,
    ]


@pytest.fixture(scope="module")
def whole(folder):
    """A run of one process that was never stopped."""
    process = runs.Process(
        folder / "logs", [*arguments(folder, folder / "whole"), "--cpu_devices=1"]
    )
    process.end(0)
    return folder / "whole"


@pytest.fixture(autouse=True)
def no_stragglers():
    yield
    runs.kill_all()


@pytest.mark.parametrize(
    "before, after",
    [
        (2, 1),
        *[pytest.param(*counts, marks=pytest.mark.deep) for counts in ((1, 1), (1, 3), (4, 2))],
    ],
)
def test_killed_and_gone_on_with_by_another_number_of_processes(
    folder, whole, tmp_path, before, after
):
    workdir, draw = tmp_path / "run", random.Random(before)
    given = arguments(folder, workdir)

    def start(count):
        if count == 1:
            return [runs.Process(tmp_path / "logs", [*given, "--cpu_devices=1"])]
        return runs.job(tmp_path / "logs", count, given)

    job = start(before)
    job[0].until(lambda: list((workdir / CHECKPOINT_FOLDER).glob(f"*/{MANIFEST}")), "a checkpoint")
    for process in draw.sample(job, len(job)):
        process.kill()
    job = start(after)
    for process in job:
        process.end(0)
    assert "resumed from step" in job[0].out
    wanted = runs.curve(whole)
    found = runs.curve(workdir)
    assert list(found) == list(wanted)
    if before == after == 1:
        assert found == wanted
    found, wanted = ([*curve.values()] for curve in (found, wanted))
    # Sums over processes are added in another order. With the compiler settings of the tests one of
    # 24 losses was 1.01e-6 off from 4 to 2 processes.
    np.testing.assert_allclose(found, wanted, rtol=2e-6)


def run_stream(workdir, start):
    """The stream of a run, made from its config alone."""
    config = runs.configs.from_dict(json.loads((workdir / "config.json").read_text()))
    data = dataset.load_dataset(config.data, lambda line: None)
    return make_stream(
        data, config.data, 32, 24, config.seed, slice(0, 24), start, config.train.steps
    )


def test_each_source_is_measured_and_the_mean_is_weighted(folder, whole, capsys):
    last = {}
    for row in runs.read_jsonl(whole / "metrics.jsonl"):
        last |= row
    # Examples have 32 tokens: 125 come before token 4,000, and step 24 of 24 rows is far beyond.
    shares = list(run_stream(whole, 0).shares(24).values())
    assert shares == pytest.approx([0.2, 0.2, 0.6], abs=0.051) and sum(shares) == pytest.approx(1)
    assert list(run_stream(whole, 0).shares(5).values()) == pytest.approx(
        [0.5, 0.3, 0.2], abs=0.051
    )
    for metric in ("loss", "bits_per_byte"):
        parts = [last[f"eval/{name}/{metric}"] for name in ("wiki", "books", "chat")]
        assert last[f"eval/{metric}"] == pytest.approx(np.dot(shares, parts), rel=1e-6)
        assert abs(last[f"eval/{metric}"] - np.mean(parts)) > 1e-4  # not the plain mean
    capsys.readouterr()
    runs.call("evaluate", f"--checkpoint={whole}", "--json")
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert set(sources) == {"wiki", "books", "chat", "all"}
    for metric in ("loss", "bits_per_byte", "accuracy", "perplexity"):
        assert sources["chat"][metric] == pytest.approx(last[f"eval/chat/{metric}"], rel=1e-5)
        assert sources["all"][metric] == pytest.approx(last[f"eval/{metric}"], rel=1e-5)
    assert sources["all"]["tokens"] == sum(
        sources[name]["tokens"] for name in ("wiki", "books", "chat")
    )


def test_evaluate_measures_what_a_prepared_folder_holds_out(folder, whole, tmp_path, capsys):
    both, chat = str(folder / "both"), str(folder / "chat")
    capsys.readouterr()
    runs.call("evaluate", f"--checkpoint={whole}", "--json")
    own = json.loads(capsys.readouterr().out)["sources"]
    runs.call("evaluate", f"--checkpoint={whole}", "--json", "--text", both, chat)
    sources = json.loads(capsys.readouterr().out)["sources"]
    assert set(sources) == {f"{both}/wiki", f"{both}/books", chat, "all"}
    assert sources[f"{both}/books"] == own["books"] and sources[chat] == own["chat"]
    mean = (
        sum(sources[name]["loss"] * sources[name]["tokens"] for name in sources if name != "all")
        / sources["all"]["tokens"]
    )
    assert sources["all"]["loss"] == pytest.approx(
        mean, rel=1e-6
    )  # of texts without weights: token by token
    rows = write_jsonl(tmp_path / "a.jsonl", texts(20))
    for name, given, words in (
        ("other", ("--eval_fraction=0.5",), "is tokenized by bytes "),
        ("all", ("--tokenizer=bytes+fim",), "holds nothing out"),
    ):
        runs.call(
            "prepare", f"--input={rows}", f"--output={tmp_path / name}", "--workers=1", *given
        )
        code, line = runs.refusal(
            "evaluate", f"--checkpoint={whole}", "--text", str(tmp_path / name)
        )
        assert (
            code == 2
            and f"--text = {tmp_path / name}" in line
            and words in line
            and "\n" not in line
        ), line


def test_a_run_says_how_often_each_source_is_seen(folder, tmp_path, capsys):
    runs.call(*arguments(folder, tmp_path / "run", "--config.train.steps=3"))
    output = capsys.readouterr().out
    for name in ("wiki", "books", "chat"):
        assert re.search(
            rf"^source {name}: [\d.]+ epochs, [\d.]+% of the rows; "
            r"best_fit rows: \d+ of 32 tokens an epoch, [\d.]+% filled",
            output,
            re.M,
        ), output


@pytest.mark.parametrize("step", [1, 20])
def test_inspect_names_every_row_of_a_step(folder, whole, capsys, step):
    """The command has the config and the seed alone.

    The documents are in the files that it names, and the ids are those of the batch that the run
    had.
    """
    capsys.readouterr()
    runs.call("inspect", f"--workdir={whole}", f"--batch={step}", "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    batch = next(run_stream(whole, step - 1))
    assert len(rows) == 24
    for row, ids in zip(rows, batch["tokens"], strict=False):
        assert row["ids"][:32] == ids[: len(row["ids"])].tolist()[:32]
        for document in row["documents"]:
            name, _, line = document["name"].rpartition(":")
            text = json.loads((folder / name).read_text().split("\n")[int(line) - 1])["text"]
            shown = document["text"].strip("\ufffd")  # a row may begin or end within a character
            assert shown in text and (document["offset"] or text.startswith(shown))
    runs.call("inspect", f"--workdir={whole}", f"--batch={step}", "--rows=2")
    shown = capsys.readouterr().out
    assert shown.count("\nrow ") == 1 and shown.startswith("row 0: example ")
    assert rows[0]["documents"][0]["name"] in shown


def test_inspect_takes_no_accelerator(whole, capsys):
    """The run itself may be using it, so JAX gets the platform of the CPU alone."""
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cuda,cpu")
    try:
        runs.call("inspect", f"--workdir={whole}", "--batch=1", "--rows=1")
        assert jax.config.jax_platforms == "cpu"
    finally:
        jax.config.update("jax_platforms", before)


def test_inspect_says_that_a_step_is_beyond_the_last(whole, capsys):
    for step, said in ((24, False), (25, True)):
        runs.call("inspect", f"--workdir={whole}", f"--batch={step}", "--rows=1")
        assert (f"step {step} is beyond the run's last, 24" in capsys.readouterr().err) == said


def test_inspect_refuses_what_is_not_there(folder, whole, tmp_path):
    assert (
        "no run has begun there" in runs.refusal("inspect", f"--workdir={tmp_path}", "--batch=1")[1]
    )
    code, line = runs.refusal("inspect", f"--workdir={whole}", "--batch=0")
    assert code == 2 and line == "--batch=0: expected 1 to 1,000,000,000,000"
    assert (
        "--rows=-1: expected 0 or more"
        in runs.refusal("inspect", f"--workdir={whole}", "--batch=1", "--rows=-1")[1]
    )
    (tmp_path / "config.json").write_text('{"model": {"layers": "x"}}')
    line = runs.refusal("inspect", f"--workdir={tmp_path}", "--batch=1")[1]
    assert f"{tmp_path}/config.json: config.model.layers = 'x': expected int" in line


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


def test_a_prepared_folder_is_a_path_like_any_other(folder, tmp_path, capsys):
    runs.call(
        "train",
        f"--config={runs.TINY}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={folder / 'both'}",
        "--config.data.tokenizer=",
        "--config.train.steps=3",
        "--config.log.progress=false",
        "--config.eval.compare_xz=true",
    )
    output = capsys.readouterr().out
    assert (
        "tokenizer bytes+fim of 260 ids" in output
        and "source wiki: " in output
        and "xz -9: " in output
    )


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


def test_a_stage_that_the_run_never_reaches_is_told(folder, tmp_path):
    config = runs.configs.resolve(runs.load(folder, *arguments(folder, tmp_path)[3:]))
    data, size = dataset.load_dataset(config.data, lambda line: None), 24 * 32
    for steps, told in (
        (6, False),
        (5, True),
        (4, True),
        (0, False),
    ):  # token 4,000 is in the sixth step
        lines = make_stream(data, config.data, 32, 24, config.seed, slice(0, 24), 0, steps).summary
        wanted = (
            "phases[0] begins at token 4,000, and the run ends before it, "
            f"at token {steps * size:,}: it is never"
        )
        assert any(wanted in line for line in lines) == told, lines


def test_counts_of_the_mixture_are_compared_between_processes(folder, tmp_path, monkeypatch):
    """Each process computes them from floats by itself.

    A process that rounds differently must be named, and nothing may be trained.
    """
    config = runs.configs.resolve(runs.load(folder, *arguments(folder, tmp_path)[3:]))
    data, facts = dataset.load_dataset(config.data, lambda line: None), []
    mesh = make_mesh({}, jax.devices()[:1])
    monkeypatch.setattr(run_parts, "find_disagreements", lambda found: facts.append(found) or [])
    run_parts.agree_on_job(config, mesh, data)
    counts, begins = facts[0]["the mixture's counts"]
    # Blocks of 20 rows; token 4,000 is row 125 of 32 tokens, before which 5 are left.
    assert (
        [sum(row) for row in counts] == [20, 5, 20]
        and begins == [0, 120, 125]
        and isinstance(counts[0][0], int)
    )
    apportion = mixture.apportion
    monkeypatch.setattr(mixture, "apportion", lambda *given: apportion(*given)[[1, 0, 2]])
    run_parts.agree_on_job(config, mesh, dataset.load_dataset(config.data, lambda line: None))
    assert facts[1]["the mixture's counts"] != facts[0]["the mixture's counts"]
    with pytest.raises(UsageError, match="at least one row later"):  # told to the others first
        close = ((1, (1.0, 1.0, 1.0)), (2, (1.0, 1.0, 1.0)))
        wrong = replace(config, data=replace(config.data, phases=close))
        run_parts.agree_on_job(wrong, mesh, data)
    assert "one row later" in facts[2]["the mixture's counts"]
    monkeypatch.setattr(
        run_parts, "find_disagreements", lambda found: [name for name in found if "mixture" in name]
    )
    with pytest.raises(UsageError, match="the mixture's counts: not the same on all processes"):
        run_parts.agree_on_job(config, mesh, data)


def test_inspect_refuses_a_folder_prepared_again_with_another_tokenizer(tmp_path, capsys):
    rows = write_jsonl(tmp_path / "a.jsonl", texts(60))
    flags = ["--input", str(rows), "--workers=1", f"--output={tmp_path / 'data'}"]
    runs.call("prepare", *flags)
    runs.call(
        "train",
        f"--config={runs.TINY}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={tmp_path / 'data'}",
        "--config.data.tokenizer=",
        "--config.train.steps=3",
        "--config.log.progress=false",
    )
    runs.call("inspect", f"--workdir={tmp_path / 'run'}", "--batch=1")
    shutil.rmtree(tmp_path / "data")
    runs.call("prepare", *flags, "--tokenizer=bpe:300")
    code, line = runs.refusal("inspect", f"--workdir={tmp_path / 'run'}", "--batch=1")
    assert code == 2 and "the text or its tokenizer has changed since the run" in line


def test_sources_of_other_names_are_another_run(tmp_path):
    """Names seed the orders of the sources of a folder, so they are part of the content."""
    for names in ("ab", "cd"):
        inputs = [
            f"{name}={write_jsonl(tmp_path / f'{i}.jsonl', texts(20, i))}"
            for i, name in enumerate(names)
        ]
        runs.call("prepare", "--input", *inputs, "--workers=1", f"--output={tmp_path / names}")
    contents = [
        dataset.load_dataset(
            runs.configs.Data(path=(str(tmp_path / names),)), lambda line: None
        ).content
        for names in ("ab", "cd")
    ]
    assert contents[0] != contents[1]
