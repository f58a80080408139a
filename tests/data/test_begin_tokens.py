"""Documents begin with the token that the model of others expects there, if the data say so."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from drawn_models import LLAMA, make_origin
from framed_tokenizers import save_tokenizer
from prepared import prepare, refused
from token_files import write_llmc

from gpt_jax import config
from gpt_jax.data import begins_documents, resolve_tokenizer, tokenizer_from_json, with_frame
from gpt_jax.data.stream.batches import make_examples
from gpt_jax.data.stream.dataset import load_dataset, load_heldout
from gpt_jax.data.stream.rows import Buffer
from gpt_jax.data.stream.transforms import fill_in_the_middle
from gpt_jax.data.tasks.classify import Classify
from gpt_jax.data.tokenizers import begin as begin_tokens
from gpt_jax.data.tokens import corpus
from gpt_jax.data.tokens.shards import Writer
from gpt_jax.errors import UsageError
from gpt_jax.evals.classified import split_row
from gpt_jax.infer import classify
from gpt_jax.interop import find_tokenizer
from gpt_jax.run.convert import make_config, open_model, write_native
from gpt_jax.run.meta import META_SCHEMA
from gpt_jax.train import CHECKPOINT_FOLDER, read_meta

BEGIN, END = 256, 257  # of `save_tokenizer`
TEXTS = ["one two", "three", "four five six", "seven eight nine ten"]


@pytest.fixture
def text(tmp_path):
    """A file of documents and a tokenizer that adds <s>."""
    save_tokenizer(tmp_path, "<s> $A")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    return tmp_path


def make_data(folder, path="text.jsonl", **changes) -> config.Data:
    fields = {
        "path": (str(folder / path),),
        "cache": str(folder / "cache"),
        "tokenizer": str(folder / "tokenizer.json"),
        "eval_fraction": 0.0,
        "begin": True,
    }
    return config.Data(**fields | changes)


def load(folder, path="text.jsonl", tokenizer=None, say=lambda line: None, **changes):
    return load_dataset(make_data(folder, path, **changes), say, tokenizer)


def read_ids(tokens) -> list[int]:
    return tokens.ids(0, tokens.size).tolist()


def frame(tokenizer, begin) -> list[int]:
    """The ids of all texts, made one by one."""
    ids = []
    for text in TEXTS:
        ids += [*begin, *tokenizer.encode(text).tolist(), END]
    return ids


def test_a_text_and_a_prepared_folder_have_it(text):
    tokenizer = resolve_tokenizer(str(text / "tokenizer.json"))
    wanted = frame(tokenizer, [BEGIN])
    out = prepare(
        text / "out",
        f"--input={text / 'text.jsonl'}",
        f"--tokenizer={tokenizer_of(text)}",
        "--begin",
    )
    for path in ("text.jsonl", "out"):
        data = load(text, path)
        train = data.parts[0].train
        assert read_ids(train) == wanted
        assert train.ids(0, train.size)[train.offsets[:-1]].tolist() == [BEGIN] * len(TEXTS)
        assert train.bytes == sum(map(len, TEXTS))
        assert tokenizer_from_json(data.tokenizer.to_json()).begin == BEGIN

    assert read_ids(load(text, begin=False).parts[0].train) == frame(tokenizer, [])
    (heldout,) = load_heldout(
        str(text / "text.jsonl"), make_data(text), data.tokenizer, lambda line: None
    ).values()
    assert read_ids(heldout) == wanted
    assert json.loads((out / "corpus.json").read_bytes())["settings"]["begin"] is True


def tokenizer_of(folder) -> str:
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("document_mask", [True, False])
def test_columns_know_where_a_document_begins(text, document_mask):
    knobs = make_data(text, packing="best_fit", document_mask=document_mask)
    data = load(text, packing="best_fit", document_mask=document_mask)
    examples = make_examples(data, knobs, 64, 0)
    columns = examples.columns(np.arange(examples.rows[0].count))
    firsts = columns["tokens"] == BEGIN
    assert firsts.sum() == len(TEXTS)
    before = columns["targets"] == BEGIN
    assert before.any() and (columns["bytes"][before] == 0).all()
    assert (columns["weight"][before] == (not document_mask)).all()
    if document_mask:
        assert (columns["position"][firsts] == 0).all()


def test_a_document_in_parts_has_one(tmp_path):
    writer = Writer(tmp_path / "a", np.dtype(np.uint16), END, BEGIN)
    for learn in (False, True):
        writer.write(np.array([1, 2]), learn=learn)
    writer.end(0, 4, 0, 0)
    writer.write(np.array([3]))
    writer.end(0, 1, 1, 0)
    writer.close()
    ids = np.fromfile(tmp_path / "a.tokens", np.uint16)
    assert ids.tolist() == [BEGIN, 1, 2, 1, 2, END, BEGIN, 3, END]
    learned = np.fromfile(tmp_path / "a.learn", np.uint8)
    assert learned.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_a_rearranged_document_keeps_it():
    ids = np.array([[BEGIN, *range(20), END]], np.int32)
    begins = np.arange(22)[None] == 0
    buffer = Buffer(ids, begins, np.ones_like(begins), np.ones_like(begins))
    sentinels = (300, 301, 302)
    moved = fill_in_the_middle(buffer, 0, np.array([0]), 1.0, 0.5, sentinels, END, BEGIN).ids[0]
    assert moved[0] == BEGIN and moved[-1] == END and set(sentinels) <= set(moved.tolist())


def test_the_frame_of_a_model_outlives_a_cache_and_a_prepared_folder(text):
    """Both were made by the file alone, which does not know how texts of the model end."""
    load(text)
    given = (f"--input={text / 'text.jsonl'}", f"--tokenizer={tokenizer_of(text)}", "--begin")
    prepare(text / "out", *given)
    framed = with_frame(find_tokenizer(text, tokenizer_of(text)), BEGIN, [97])
    for path in ("text.jsonl", "out"):
        found = load(text, path, framed).tokenizer
        assert (found.begin, found.ends) == (BEGIN, (97,))


def test_documents_without_it_are_told(text):
    framed = find_tokenizer(text, tokenizer_of(text))
    for begin, tokenizer, count in ((False, framed, 1), (True, framed, 0), (False, None, 0)):
        said = []
        load(text, tokenizer=tokenizer, say=said.append, begin=begin)
        assert sum("config.data.begin=true puts it there" in line for line in said) == count


@pytest.mark.parametrize("spec", ["bytes", "bpe:300", "char", "plain"])
def test_a_tokenizer_without_such_a_token_is_refused(text, spec):
    if spec == "plain":
        spec = save_tokenizer(text, "")
    with pytest.raises(UsageError, match=r"^config.data.begin = True: the tokenizer .* no token"):
        load_dataset(make_data(text, tokenizer=spec), lambda line: None)
    refused(
        2,
        ("--begin: the tokenizer", "name the tokenizer of a model"),
        f"--input={text / 'text.jsonl'}",
        f"--output={text / 'out'}",
        f"--tokenizer={spec}",
        "--begin",
    )


def test_one_token_for_both_ends_is_refused(text):
    tokenizer = with_frame(resolve_tokenizer(tokenizer_of(text)), END, [])
    assert not begins_documents(tokenizer)
    with pytest.raises(UsageError, match="begins and ends texts with one token, </s>"):
        begin_tokens.require_begin(tokenizer, "config.data.begin = True")


def test_a_folder_and_the_config_must_agree(text):
    given = (f"--input={text / 'text.jsonl'}", f"--tokenizer={tokenizer_of(text)}")
    prepare(text / "with", *given, "--begin")
    prepare(text / "without", *given)
    for path, begin, way in (
        ("with", False, "without --begin, or set config.data.begin=true"),
        ("without", True, "with --begin, or set config.data.begin=false"),
    ):
        with pytest.raises(UsageError, match=way):
            load(text, path, begin=begin)
        with pytest.raises(UsageError, match=r"^--text = .*prepare it again with(out)? --begin$"):
            load_heldout(
                str(text / path),
                make_data(text, begin=begin),
                resolve_tokenizer(tokenizer_of(text)),
                lambda line: None,
            )
    refused(2, ("--begin was True and is None",), f"--output={text / 'with'}", *given)


def test_a_folder_with_another_token_than_the_model_is_refused(text):
    prepare(
        text / "out",
        f"--input={text / 'text.jsonl'}",
        f"--tokenizer={tokenizer_of(text)}",
        "--begin",
    )
    other = with_frame(resolve_tokenizer(tokenizer_of(text)), 97, [])
    with pytest.raises(UsageError, match="begin with <s>, and texts of the model with 97"):
        load(text, "out", other)


def test_a_token_file_must_have_it(text):
    tokenizer = resolve_tokenizer(tokenizer_of(text))
    write_llmc(text / "with.bin", np.array(frame(tokenizer, [BEGIN])))
    write_llmc(text / "without.bin", np.array(frame(tokenizer, [])))
    train = load(text, "with.bin").parts[0].train
    assert train.ids(0, train.size)[train.offsets[:-1]].tolist() == [BEGIN] * len(TEXTS)
    with pytest.raises(UsageError, match=r"without.bin begins with the id \d+ and not with <s>"):
        load(text, "without.bin")


def test_a_converted_checkpoint_measures_text_after_it(text):
    tokenizer = find_tokenizer(text, tokenizer_of(text))
    write_native(make_origin(LLAMA)._replace(tokenizer=tokenizer), text / "native", print)
    meta = read_meta(text / "native" / CHECKPOINT_FOLDER, 0, META_SCHEMA)
    assert meta["config"]["data"]["begin"] is True
    assert open_model(str(text / "native"), 0, print).tokenizer.begin == BEGIN
    assert make_config(make_origin(LLAMA).model, resolve_tokenizer("bytes")).data.begin is False


def test_a_classified_prompt_is_read_as_it_was_learned(text, monkeypatch):
    """A prompt has its ids and the begin of the prepared row, label and end included."""
    (text / "rows.jsonl").write_text(json.dumps({"text": "one", "label": "b"}) + "\n")
    task = ("--task=classify", "--task_options", "prompt={text}=", 'labels=["a", "b"]')
    spec = f"--tokenizer={tokenizer_of(text)}"
    out = prepare(text / "out", f"--input={text / 'rows.jsonl'}", spec, "--begin", *task)
    opened = corpus.open_corpus(out)
    learned = split_row(opened.sources["text"]["train"], 0)

    asked = []

    def score(model, compute, params, requests, report, tick):
        asked.extend(requests)
        return [SimpleNamespace(total=0.0) for _ in requests]

    monkeypatch.setattr(classify, "score_requests", score)
    options = Classify("{text}=", labels=(("a", "a"), ("b", "b")))
    given = (None, None, None, opened.tokenizer, ["one="], options, print)
    classify.classify_prompts(*given)
    assert learned[0][0] == BEGIN
    assert [ids.tolist() for ids in asked[1]] == [ids.tolist() for ids in learned]


def test_a_template_that_writes_the_begin_gets_no_second_one(text):
    """Templates of most models write it themselves."""
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (text / "talks.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    form = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    ids = []
    for number, written in enumerate(("", "{{ bos_token }}")):
        settings = {"chat_template": written + form, "bos_token": "<s>"}
        (text / "tokenizer_config.json").write_text(json.dumps(settings))
        given = f"--input={text / 'talks.jsonl'}", f"--tokenizer={tokenizer_of(text)}"
        out = prepare(text / f"out{number}", *given, "--begin", "--task=chat")
        ids.append(read_ids(corpus.open_corpus(out).sources["text"]["train"]))
    assert ids[0] == ids[1]
    assert ids[0].count(BEGIN) == 1
