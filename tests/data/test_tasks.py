"""What is learned: from a row of JSON to the weights of a batch.

Letters tell what must come out. Prompts are of small letters and answers of capitals, so that the
targets that are learned are the capitals, and the end of text after them.
"""

import hashlib
import json
import random

import fsspec
import numpy as np
import pytest
import runs
from prepared import contents, prepare, refused, texts, write_jsonl
from streams import make_stream

from gpt_jax import config
from gpt_jax.data.read.decoding import Reading, Unreadable, field_text
from gpt_jax.data.stream import batches as pipeline
from gpt_jax.data.stream.dataset import load_dataset
from gpt_jax.data.stream.rows import PACKINGS
from gpt_jax.data.tasks.example import Example, Span, make_example
from gpt_jax.data.tasks.tasks import TASKS
from gpt_jax.data.tokens import corpus, shards
from gpt_jax.data.tokens.mirror import mirror
from gpt_jax.errors import UsageError

EOT = 256
T, ROWS = 24, 8


def read(row, task: str, **more):
    return field_text(row, Reading(task=task, **more))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw_letters(draw: random.Random, alphabet: str, longest: int) -> str:
    return "".join(draw.choices(alphabet, k=draw.randint(0, longest)))


def make_pairs(count: int, seed: int = 0) -> list[dict]:
    """Prompts of small letters, some empty, and answers of capitals."""
    draw = random.Random(seed)
    return [
        {
            "prompt": draw_letters(draw, "abcdef", 20),
            "response": "X" + draw_letters(draw, "ABCDEF", 30),
        }
        for _ in range(count)
    ]


def as_spans(pair: dict) -> dict:
    """The same in the other form, cut into more spans than there are changes."""
    prompt, response = pair["prompt"], pair["response"]
    half = len(prompt) // 2
    return {
        "spans": [
            {"text": prompt[:half], "learn": False},
            {"text": "", "learn": True},
            {"text": prompt[half:], "learn": False},
            {"text": response[:1]},
            {"text": response[1:], "learn": True},
        ]
    }


def is_learned(ids: np.ndarray) -> np.ndarray:
    """Capitals, and the end of text."""
    return ((ids >= ord("A")) & (ids <= ord("Z"))) | (ids == EOT)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A prepared folder of pairs: both sides, several shards."""
    folder = tmp_path_factory.mktemp("pairs")
    path = write_rows(folder / "pairs.jsonl", make_pairs(120))
    given = [f"--input={path}", "--eval_fraction=0.2", "--piece_mb=0.002", "--task=supervised"]
    return prepare(folder / "out", *given)


# ---- rows ----------------------------------------------------------------------------------------


def test_examples_join_neighbours_and_leave_out_what_is_empty():
    spans = [Span("", False), Span("a"), Span("b"), Span("", False), Span("c"), Span("d", False)]
    example = make_example(spans)
    assert example == Example((Span("abc"), Span("d", False)))
    assert example.text == "abcd"
    assert make_example([]) == make_example([Span("", False)]) == Example((Span(""),))


def test_a_row_is_read_by_its_task():
    assert read({"text": "ab"}, "plain") == ("ab", "utf-8", 0, ())
    pair = {"prompt": "ab", "response": "CD"}
    wanted = Span("ab", False), Span("CD", True)
    assert read(pair, "supervised") == ("abCD", "utf-8", 0, wanted)
    assert read(as_spans(pair), "spans") == ("abCD", "utf-8", 0, wanted)
    assert read({"prompt": "", "response": "CD"}, "supervised").spans == ()
    assert set(TASKS) == {"plain", "supervised", "spans", "chat", "classify", "translate"}


def test_half_a_character_is_mended_in_its_span():
    row = {"prompt": "a\ud83d", "response": "B"}
    with pytest.raises(Unreadable, match="character 1 is a lone surrogate"):
        read(row, "supervised")
    mended = read(row, "supervised", errors="replace")
    assert mended == ("a\ufffdB", "utf-8", 1, (Span("a\ufffd", False), Span("B")))


@pytest.mark.parametrize(
    "row, task, words",
    [
        ({"prompt": "a"}, "supervised", "'response' of --task=supervised is missing; fields there"),
        ({"prompt": "a", "response": 1}, "supervised", "holds int, expected text"),
        ({"text": "a"}, "spans", "'spans' of --task=spans is missing; fields there: text"),
        ({"spans": "a"}, "spans", "holds str, expected a list"),
        ({"spans": ["a"]}, "spans", r"spans\[0\] is str, expected an object"),
        ({"spans": [{"text": "a"}, {"learn": True}]}, "spans", r"spans\[1\].text is missing"),
        ({"spans": [{"text": "a", "learn": 0}]}, "spans", "holds int, expected true or false"),
    ],
)
def test_rows_that_are_no_example(row, task, words):
    with pytest.raises(Unreadable, match=words):
        read(row, task)


# ---- corpora -------------------------------------------------------------------------------------


def test_bits_lie_beside_the_tokens(pairs):
    opened = corpus.open_corpus(pairs)
    for tokens in opened.sources["text"].values():
        bits = np.empty(tokens.size, shards.LEARN)
        tokens.read_learn(0, bits)
        ids = tokens.ids(0, tokens.size)
        np.testing.assert_array_equal(bits, is_learned(ids))
        assert 0.3 < bits.mean() < 0.9
        part = np.empty(50, shards.LEARN)
        tokens.read_learn(37, part)
        np.testing.assert_array_equal(part, bits[37:87])
    assert len(opened.sources["text"]["train"].shards) > 2
    assert not (pairs / "work").exists()


def test_the_end_is_learned_if_the_last_span_is(tmp_path):
    rows = [
        {"spans": [{"text": "AB"}, {"text": "cd", "learn": False}]},
        {"spans": [{"text": "cd", "learn": False}]},
        {"spans": [{"text": "AB"}]},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    tokens = corpus.open_corpus(
        prepare(tmp_path / "out", f"--input={path}", "--task=spans")
    ).sources["text"]["train"]
    bits = np.empty(tokens.size, shards.LEARN)
    tokens.read_learn(0, bits)
    assert bits.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_workers_units_and_forms_change_nothing(pairs, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", make_pairs(120))
    given = [f"--input={path}", "--eval_fraction=0.2", "--task=supervised"]
    two = contents(prepare(tmp_path / "two", *given, "--piece_mb=0.002", workers=2))
    one = contents(pairs)
    del one["inputs.json"], two["inputs.json"]
    assert one == two

    # A file that is one list of objects is read by its task, too.
    path.with_suffix(".json").write_text(json.dumps(make_pairs(120)))
    listed = prepare(
        tmp_path / "listed",
        f"--input={path.with_suffix('.json')}",
        "--eval_fraction=0.2",
        "--task=supervised",
    )
    large = prepare(tmp_path / "large", *given)
    for name in ("train-00000.tokens", "train-00000.learn"):
        assert (listed / "text" / name).read_bytes() == (large / "text" / name).read_bytes()

    spans = write_rows(tmp_path / "spans.jsonl", map(as_spans, make_pairs(120)))
    other = prepare(tmp_path / "spans", f"--input={spans}", "--eval_fraction=0.2", "--task=spans")
    names = ["train-00000.tokens", "train-00000.learn", "eval-00000.learn", "train.offsets"]
    for name in names:
        assert (large / "text" / name).read_bytes() == (other / "text" / name).read_bytes(), name
    found = {corpus.open_corpus(folder).content for folder in (pairs, large, other)}
    assert len(found) == 1

    # The same texts of which all is learned are other content, because a run of it is another one.
    whole = write_jsonl(
        tmp_path / "whole.jsonl", [row["prompt"] + row["response"] for row in make_pairs(120)]
    )
    plain = prepare(tmp_path / "plain", f"--input={whole}", "--eval_fraction=0.2")
    assert (plain / "text/train-00000.tokens").read_bytes() == (
        large / "text/train-00000.tokens"
    ).read_bytes()
    assert corpus.open_corpus(plain).content not in found


def test_a_corpus_of_which_all_is_learned_is_one_without_bits(tmp_path):
    rows = texts(60, 1)
    plain = write_jsonl(tmp_path / "plain.jsonl", rows)
    spans = [{"spans": [{"text": text[:5]}, {"text": text[5:], "learn": True}]} for text in rows]
    other = write_rows(tmp_path / "spans.jsonl", spans)
    more = ("--eval_fraction=0.2", "--tokenizer=bpe:300", "--piece_mb=9")
    one = contents(prepare(tmp_path / "one", f"--input={plain}", *more))
    two = contents(prepare(tmp_path / "two", f"--input={other}", "--task=spans", *more))

    assert one.keys() == two.keys()
    differing = {name for name in one if one[name] != two[name]}
    # Only the name of the input, and the flag.
    assert differing == {"inputs.json", "corpus.json", "text/origins.json"}
    before, after = json.loads(one["corpus.json"]), json.loads(two["corpus.json"])
    assert before["format"] == after["format"] == 1
    assert before["content"] == after["content"]
    assert after["settings"] == before["settings"] | {"task": "spans"}


def test_a_corpus_without_bits_is_the_one_it_always_was(tmp_path):
    """The digest was seen before there were tasks. Folders of that time open, and go on."""
    path = write_jsonl(tmp_path / "in.jsonl", texts(40, 3))
    out = prepare(tmp_path / "out", f"--input={path}", "--eval_fraction=0.2", "--piece_mb=0.001")
    raw = (out / "corpus.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest()[:16] == "61a4ed8ba3357872"


def test_damage_copies_and_older_versions(pairs, tmp_path):
    """A flipped bit is named, a missing file too; a copy from a store has the bits."""
    store = fsspec.filesystem("memory")
    store.put(str(pairs), "/bucket/pairs", recursive=True)
    copied = mirror("memory://bucket/pairs", tmp_path / "cache", lambda line: None)
    wanted = contents(pairs)
    del wanted["inputs.json"]
    assert contents(copied) == wanted
    runs.call("prepare", f"--verify={copied}")

    path = copied / "text/train-00001.learn"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    refused(20, ("1 damaged: text/train-00001.learn",), f"--verify={copied}")
    path.unlink()
    code, line = runs.refusal("prepare", f"--inspect={copied}")
    assert code == 20 and "train-00001.learn" in line

    # A version that knows no bits reads format 1 alone, so it does not train on all tokens.
    assert json.loads((pairs / "corpus.json").read_bytes())["format"] == 2


def test_inspect_tells_how_much_is_learned(pairs, capsys):
    runs.call("prepare", f"--inspect={pairs}")
    out = capsys.readouterr().out
    tokens = corpus.open_corpus(pairs).sources["text"]["train"]
    share = is_learned(tokens.ids(0, tokens.size)).mean()
    assert f"text/train: {share:.1%} of the tokens are learned (--task)" in out


def test_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", make_pairs(5))
    given = (f"--output={tmp_path / 'out'}", f"--input={path}", "--task=supervised")
    words = ("rows.jsonl:1", "--filters changes its text", "--task")
    refused(2, words, *given, "--filters", "replace:/X/Y/")
    words = ("--task='sort': choose one of plain, spans, supervised",)
    refused(2, words, *given[:2], "--task=sort")
    text = tmp_path / "rows.txt"
    text.write_text("a\n")
    words = ("rows.txt: --task=supervised reads rows with columns", ".jsonl")
    refused(2, words, f"--output={tmp_path / 'out2'}", f"--input={text}", given[2])

    # A filter that keeps or drops is of use as ever.
    out = prepare(
        tmp_path / "kept", f"--input={path}", "--task=supervised", "--filters", "min_chars:20"
    )
    documents = corpus.open_corpus(out).sources["text"]["train"].documents
    lengths = [len(row["prompt"] + row["response"]) for row in make_pairs(5)]
    assert documents == sum(length >= 20 for length in lengths) < 5


# ---- batches -------------------------------------------------------------------------------------


def take(data, knobs, rows=slice(0, ROWS), count=12):
    stream = make_stream(data, knobs, T, ROWS, 7, rows)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def weights_by_hand(batch, document_mask: bool) -> np.ndarray:
    """A target is learned by its letter, if it is no padding and, with the mask, no beginning."""
    weight = is_learned(batch["targets"])
    if not document_mask:
        return weight
    weight &= batch["segment"] > 0
    for row in range(ROWS):
        for column in range(T):
            # Behind an end of text another document begins.
            weight[row, column] &= batch["tokens"][row, column] != EOT
    return weight


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("packing", PACKINGS)
def test_weights_are_those_of_the_letters(pairs, packing, document_mask):
    knobs = config.Data(path=(str(pairs),), packing=packing, document_mask=document_mask)
    data = load_dataset(knobs, lambda line: None)
    learned = targets = 0
    for batch in take(data, knobs):
        wanted = weights_by_hand(batch, document_mask)
        np.testing.assert_array_equal(batch["weight"], wanted.astype(np.float32))
        assert batch["weight"].dtype == np.float32
        np.testing.assert_array_equal(batch["bytes"], wanted & (batch["targets"] < EOT))
        learned += wanted.sum()
        targets += wanted.size
    assert 0.2 * targets < learned < 0.9 * targets


def test_held_out_text_is_measured_where_it_is_learned(pairs):
    knobs = config.Data(path=(str(pairs),), document_mask=True)
    data = load_dataset(knobs, lambda line: None)
    tokens = data.heldout["text"]
    batches = pipeline.make_eval_batches(tokens, data.tokenizer, knobs, T, ROWS, slice(0, ROWS))
    total = sum(batch["weight"].sum() for batch in batches)
    # The first token of a document is no target, and it is learned where the prompt is empty.
    first = is_learned(tokens.ids(0, tokens.size)[tokens.offsets[:-1]]).sum()
    assert total == is_learned(tokens.ids(0, tokens.size)).sum() - first


@pytest.fixture
def mixed(pairs, tmp_path):
    """Pairs, and a text of capitals and small letters of which all is learned."""
    rows = [{"text": row["prompt"] + row["response"]} for row in make_pairs(80, seed=1)]
    out = prepare(tmp_path / "plain", f"--input={write_rows(tmp_path / 'plain.jsonl', rows)}")
    sources = (("pairs", str(pairs), 0.5), ("plain", str(out), 0.5))
    return config.Data(sources=sources, packing="best_fit", document_mask=True, block=10)


def test_a_mixture_keeps_the_bits_of_each_source(mixed):
    data = load_dataset(mixed, lambda line: None)
    examples = pipeline.make_examples(data, mixed, T, 3)
    indices = np.arange(40)
    source, _ = examples.assign(indices)
    columns = examples.columns(indices)
    inside = (columns["segment"] > 0) & (columns["tokens"] != EOT)
    letters = is_learned(columns["targets"]) & inside
    wanted = np.where((source == 0)[:, None], letters, inside)
    np.testing.assert_array_equal(columns["weight"], wanted)
    assert set(source) == {0, 1}


def test_processes_get_the_rows_of_one(mixed):
    """With documents moved inside their rows, too: a bit goes where its token goes."""
    knobs = config.Data(
        sources=mixed.sources, packing="best_fit", document_mask=True, shuffle_documents=True
    )
    data = load_dataset(knobs, lambda line: None)
    whole = take(data, knobs)
    for parts in (2, 4):
        size = ROWS // parts
        shares = [take(data, knobs, slice(i * size, (i + 1) * size)) for i in range(parts)]
        for batch, *pieces in zip(whole, *shares, strict=True):
            for name, column in batch.items():
                np.testing.assert_array_equal(column, np.concatenate([p[name] for p in pieces]))


def test_moved_documents_keep_their_bits(pairs):
    knobs = config.Data(
        path=(str(pairs),), packing="first_fit", document_mask=True, shuffle_documents=True
    )
    for batch in take(load_dataset(knobs, lambda line: None), knobs):
        np.testing.assert_array_equal(batch["weight"], weights_by_hand(batch, True))


def test_filling_in_the_middle_needs_text_that_is_learned_whole(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", make_pairs(60))
    given = (f"--input={path}", "--task=supervised", "--tokenizer=bytes+fim")
    knobs = config.Data(path=(str(prepare(tmp_path / "out", *given)),), fim=0.5)
    data = load_dataset(knobs, lambda line: None)
    with pytest.raises(UsageError, match=r"fim = 0\.5: source text was prepared with --task"):
        pipeline.make_examples(data, knobs, T, 0)
