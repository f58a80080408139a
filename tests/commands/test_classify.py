"""`gpt-jax classify`, and the fine-tuning before it: from rows to labels without flags."""

import csv
import json
import math

import numpy as np
import pytest
import runs
from prepared import documents, prepare

import gpt_jax
from gpt_jax.commands import classify, classify_file
from gpt_jax.data.tokens import corpus
from gpt_jax.errors import UsageError
from gpt_jax.metrics.writers import read_jsonl
from gpt_jax.train import CHECKPOINT_FOLDER, read_meta

CONFIG = f"{runs.ROOT}/configs/finetune.py"
LABELS = {"0": "bad", "1": "good"}
OPTIONS = "--task_options", "prompt={text}=", f"labels={json.dumps(LABELS)}"
# What makes a run of the config a matter of seconds.
SMALL = (
    "--config.train.steps=2",
    "--config.train.batch_size=8",
    "--config.train.seq_len=64",
    "--config.optim.warmup_steps=1",
    "--config.optim.learning_rate=0.01",
    "--config.log.tensorboard=false",
)


def make_rows(count: int) -> list[dict]:
    draw = np.random.default_rng(0)
    words = [["dull", "long", "poor"], ["fine", "warm", "rich"]]
    rows = []
    for number in range(count):
        label = int(draw.integers(2))
        text = " ".join(draw.choice(words[label], int(draw.integers(1, 5))))
        rows.append({"text": f"{number} {text}", "label": label})
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def list_flags(folder, base, task: str, data) -> list[str]:
    """The command line that starts from `base` and trains on `data`."""
    return [
        "train",
        f"--config={CONFIG}:{task}",
        f"--workdir={folder}",
        f"--config.init.from={base}",
        f"--config.data.path={data}",
        "--config.data.workers=1",
        "--config.log.progress=false",
        *SMALL,
    ]


def finetune(folder, base, task: str, data):
    runs.call(*list_flags(folder, base, task, data))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("classify")


@pytest.fixture(scope="module")
def base(folder):
    """A run on plain text, of which all rows are learned."""
    long = ("--config.train.seq_len=64", "--config.model.max_seq=64", "--config.train.steps=2")
    runs.run(runs.build(runs.load(folder, *long)), folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def tuned(folder, base):
    """A run of configs/finetune.py:classify, which starts from the other one."""
    path = write_rows(folder / "rows.jsonl", make_rows(60))
    given = f"--input={path}", "--task=classify", *OPTIONS, "--eval_fraction=0.3"
    data = prepare(folder / "data", *given)
    return finetune(folder / "tuned", base, "classify", data)


@pytest.fixture(scope="module")
def heldout(folder, tuned):
    """The held-out rows as a file."""
    pairs = [text.split("=") for text in documents(folder / "data")["text"]["eval"]]
    names = {words: name for name, words in LABELS.items()}
    rows = [{"text": text, "label": names[words]} for text, words in pairs]
    assert len({row["label"] for row in rows}) == 2
    return write_rows(folder / "heldout.jsonl", rows)


def test_a_text_needs_no_flags(call, folder, tuned):
    note = {"task": "classify", "options": {"prompt": "{text}=", "labels": json.dumps(LABELS)}}
    assert read_meta(tuned / CHECKPOINT_FOLDER, 2)["tasks"] == [note]
    out, _ = call("classify", f"--checkpoint={tuned}", "--text", "7 fine", "8 dull")
    found = [json.loads(line) for line in out.splitlines()]
    model = gpt_jax.load(str(tuned), devices=1)
    asked = model.classify(["7 fine", {"text": "8 dull"}])
    for one, other in zip(found, asked, strict=True):
        assert one["label"] == other.label
        assert one["probabilities"] == pytest.approx(other.probabilities, rel=1e-4)
    for one in found:
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert one["label"] == max(one["probabilities"], key=one["probabilities"].get)
    with pytest.raises(UsageError, match="text 1: the column 'text' of --task=classify is empty"):
        model.classify("")


def test_the_evaluator_and_the_command_agree(call, folder, tuned, heldout):
    """The evaluator reads ids and bits of the corpus, and the command reads the text."""
    last = {}
    for row in read_jsonl(tuned / "metrics.jsonl"):
        last |= row
    given = f"--checkpoint={tuned}", f"--file={heldout}", f"--page={folder / 'page.html'}"
    out, _ = call("classify", *given, f"--out={folder / 'agree.csv'}", "--label=label", "--json")
    measured = json.loads(out)
    for name in ("accuracy", "macro_f1", "ece"):
        assert measured[name] == pytest.approx(last[f"eval/classification/{name}"], abs=1e-5)
        bounds = [last[f"eval/classification/{name}_{side}"] for side in ("low", "high")]
        assert measured["intervals"][name] == pytest.approx(bounds, abs=1e-5)
    assert measured["rows"] == last["eval/classification/rows"] > 10
    assert last["sample/classification"].split("\n")[0] == "label \\ chosen\t0\t1"
    assert "macro-F1" in (folder / "page.html").read_text()

    out, _ = call("evaluate", f"--checkpoint={tuned}", "--evaluators", "classification", "--json")
    again = json.loads(out)["evaluators"]
    assert again["eval/classification/ece"] == pytest.approx(measured["ece"], abs=1e-5)


@pytest.mark.parametrize("suffix", ["jsonl", pytest.param("csv", marks=pytest.mark.deep)])
def test_an_interrupted_file_is_continued(call, folder, tuned, heldout, suffix, monkeypatch):
    whole, cut = folder / f"whole.{suffix}", folder / f"cut.{suffix}"
    given = f"--checkpoint={tuned}", f"--file={heldout}", "--label=label"
    call("classify", *given, f"--out={whole}")
    texts = [json.loads(line)["text"] for line in heldout.read_text().splitlines()]
    with open(whole, newline="") as file:
        rows = list(csv.DictReader(file)) if suffix == "csv" else list(map(json.loads, file))
    assert [int(row["row"]) for row in rows] == list(range(1, len(texts) + 1))

    monkeypatch.setattr(classify_file, "ROWS", 5)
    label_rows = classify_file.label_documents

    def end_early(*arguments):
        for number, row in enumerate(label_rows(*arguments)):
            if number == 7:
                raise OSError(28, "No space left on device")
            yield row

    monkeypatch.setattr(classify_file, "label_documents", end_early)
    code, line = runs.refusal("classify", *given, f"--out={cut}")
    assert code == 2 and "No space left" in line and "the same command goes on" in line
    monkeypatch.setattr(classify_file, "label_documents", label_rows)
    with open(cut, "ab") as file:
        file.write(b'{"torn')
    other = "--on_error=skip"
    code, line = runs.refusal("classify", *given, f"--out={cut}", other)
    assert code == 2 and "was begun with another checkpoint, file or options" in line

    _, err = call("classify", *given, f"--out={cut}")
    assert "7 rows are there already" in err
    assert len(cut.read_text().splitlines()) == len(whole.read_text().splitlines())
    labels = [classify_file.READERS[f".{suffix}"](path, ("0", "1")) for path in (whole, cut)]
    for one, two in zip(*labels, strict=True):
        assert one[:2] == two[:2] and one[2] == pytest.approx(two[2], rel=1e-4)
    code, line = runs.refusal("classify", *given, f"--out={cut}")
    assert code == 2 and "is there already; remove it" in line


def test_adapters_are_measured_as_the_command_applies_them(call, folder, base, tuned, heldout):
    flags = list_flags(folder / "lora", base, "classify", folder / "data")
    call(*flags, "--config.lora.rank=2", "--config.train.steps=20")
    last = {}
    for row in read_jsonl(folder / "lora" / "metrics.jsonl"):
        last |= row
    given = f"--checkpoint={folder / 'lora'}", f"--file={heldout}", f"--out={folder / 'lora.csv'}"
    out, _ = call("classify", *given, "--label=label", "--json")
    assert json.loads(out)["ece"] == pytest.approx(last["eval/classification/ece"], abs=1e-5)


def test_a_mended_call_writes_the_file_that_a_failed_one_began(call, folder, tuned, heldout):
    given = f"--checkpoint={tuned}", f"--file={heldout}", f"--out={folder / 'mended.csv'}"
    code, line = runs.refusal("classify", *given, "--label=lable")
    assert code == 2 and "lable" in line
    call("classify", *given, "--label=label")
    assert len((folder / "mended.csv").read_text().splitlines()) > 10


def test_a_reader_that_leaves_is_no_mistake(folder, tuned, heldout, monkeypatch):
    def leave(text):
        raise BrokenPipeError

    monkeypatch.setattr(classify_file, "emit", leave)
    with pytest.raises(BrokenPipeError):
        classify.main([f"--checkpoint={tuned}", f"--file={heldout}"])


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_scores_that_are_no_numbers_are_written(tmp_path, suffix):
    """JSON has no NaN, and the file is measured all the same."""
    shares = dict.fromkeys(LABELS, math.nan)
    row = {"row": 1, "label": "0", "probabilities": shares, "gold": "1"}
    line = classify_file.WRITERS[suffix](row)
    assert "NaN" not in line
    header = classify_file.write_csv_header(("0", "1"), True) if suffix == ".csv" else ""
    path = tmp_path / f"out{suffix}"
    path.write_text(header + line)
    [(gold, label, share)] = classify_file.READERS[suffix](path, ("0", "1"))
    assert (gold, label) == ("1", "0") and math.isnan(share)


def test_a_table_without_labels_is_printed(call, folder, tuned):
    path = folder / "new.csv"
    path.write_text("more,text\nx,fine warm\n\ny,dull\n")
    out, _ = call("classify", f"--checkpoint={tuned}", f"--file={path}")
    rows = [json.loads(line) for line in out.splitlines()]
    # The header and the empty line are rows of the file.
    assert [row["row"] for row in rows] == [2, 4]
    path.write_text("more,text\nx,fine warm\ny,\n")
    code, line = runs.refusal("classify", f"--checkpoint={tuned}", f"--file={path}")
    assert code == 2 and "new.csv:3: the column 'text' of --task=classify is empty" in line


def test_a_checkpoint_without_labels_names_the_flags(call, base):
    code, line = runs.refusal("classify", f"--checkpoint={base}", "--text=a")
    assert code == 2 and "was trained on no classification" in line
    assert "--task_options prompt=… labels=…" in line
    out, _ = call("classify", f"--checkpoint={base}", "--text=a", *OPTIONS)
    asked = gpt_jax.load(str(base), devices=1).classify("a", prompt="{text}=", labels=LABELS)
    assert json.loads(out)["label"] == asked[0].label


@pytest.mark.parametrize(
    "given, words",
    [
        ((), "--text and --file: give one of them"),
        (("--text=a", "--file=b"), "--text and --file: give one of them"),
        (("--file=/none.csv",), "--file=/none.csv: no such file"),
        (("--text=a", "--out=b.csv"), "--out=b.csv: needs --file"),
        (("--file=/none.csv", "--label=x"), "--label=x: needs --out"),
        (("--file=/none.csv", "--page=x.html"), "--page=x.html: needs --label"),
        (("--file=/", "--out=b.txt"), "--out=b.txt: expected a name that ends in .jsonl or .csv"),
        (("--file=/", "--on_error=no"), "--on_error=no: choose one of stop, skip"),
        (("--text=a", "--task_options", "labels"), "--task_options labels: expected NAME=VALUE"),
        (("--text=a", "--task_options", "label="), "--task_options label=: has no value"),
    ],
)
def test_flags_that_do_not_go_together(given, words):
    code, line = runs.refusal("classify", "--checkpoint=/none", *given)
    assert code == 2 and words in line


@pytest.mark.deep
def test_a_chat_is_fine_tuned(folder, base):
    """The tokenizer has two ids more than that of the checkpoint, whose embedding has room."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": [*turns, turns[0] | {"content": str(i)}, turns[1]]} for i in range(60)]
    path = write_rows(folder / "talks.jsonl", rows)
    data = prepare(folder / "talks", f"--input={path}", "--task=chat", "--tokenizer=bytes+chat")
    assert corpus.read_manifest(data)["settings"]["task_options"] == {"template": "chatml"}
    assert_tuned(finetune(folder / "talked", base, "chat", data), "chat")


@pytest.mark.deep
def test_a_translation_is_fine_tuned(folder, base):
    rows = [{"source": f"{i} one", "target": f"{i} eins"} for i in range(60)]
    path = write_rows(folder / "pairs.jsonl", rows)
    data = prepare(folder / "pairs", f"--input={path}", "--task=translate")
    assert_tuned(finetune(folder / "translated", base, "translate", data), "translate")


def assert_tuned(done, task: str) -> None:
    """The loss is finite, and the checkpoint notes the task."""
    losses = runs.curve(done, "train/loss")
    assert losses and np.isfinite(list(losses.values())).all()
    [note] = read_meta(done / CHECKPOINT_FOLDER, 2)["tasks"]
    assert note["task"] == task


def test_a_corpus_takes_the_tokenizer_of_a_run(folder, tuned, call):
    """That of a workdir, and that of another corpus, with special tokens added to it."""
    path = write_rows(folder / "few.jsonl", [{"text": "ab"}])
    made = []
    for number, spec in enumerate((tuned, folder / "data", f"{tuned}+fim", "bytes+fim")):
        given = f"--input={path}", f"--tokenizer={spec}"
        made.append(corpus.open_corpus(prepare(folder / f"few{number}", *given)).tokenizer)
    assert (
        made[0].fingerprint
        == made[1].fingerprint
        == corpus.open_corpus(folder / "data").tokenizer.fingerprint
    )
    assert made[2].fingerprint == made[3].fingerprint != made[0].fingerprint
    assert str(folder) not in (folder / "few0/corpus.json").read_text()


def test_a_tokenizer_that_lacks_tokens_is_named_by_its_run(folder, tuned):
    row = {"turns": ["hi", "hello"]}
    given = f"--input={write_rows(folder / 'turns.jsonl', [row])}", f"--output={folder / 'no'}"
    code, line = runs.refusal("prepare", *given, "--task=chat", f"--tokenizer={tuned}")
    assert code == 2 and f"give --tokenizer={tuned}+chat" in line


def test_labels_are_asked_of_data_that_has_them(folder, base):
    path = write_rows(folder / "plain.jsonl", make_rows(60))
    data = prepare(folder / "plain", f"--input={path}", "--eval_fraction=0.3")
    code, line = runs.refusal(*list_flags(folder / "refused", base, "classify", data))
    assert code == 2 and "config.eval.evaluators: has classification, and the data holds" in line
