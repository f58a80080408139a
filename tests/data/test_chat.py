"""Conversations as a task: their shapes, what is learned, and chat templates in their sandbox."""

import gzip
import json
import re

import numpy as np
import pytest
from prepared import documents, prepare, refused

from gpt_jax.data.read.decoding import Reading, Unreadable, field_text
from gpt_jax.data.read.sources import find_sources
from gpt_jax.data.tasks import template
from gpt_jax.data.tasks.conversations import Turn, read_turns
from gpt_jax.data.tokens import corpus, shards

TALK = [("user", "hi"), ("assistant", "HO"), ("user", "and?"), ("assistant", "SO")]


def as_messages(turns, role="role", content="content"):
    return [{role: name, content: text} for name, text in turns]


def as_row(turns):
    return {"messages": as_messages(turns)}


def read(row, *options):
    return field_text(row, Reading(task="chat", task_options=options)).spans


def learned_text(spans) -> str:
    return "".join(f"[{span.text}]" if span.special else span.text for span in spans if span.learn)


def whole_text(spans) -> str:
    return "".join(span.text for span in spans)


# ---- shapes ----


@pytest.mark.parametrize(
    "row",
    [
        as_row(TALK),
        {
            "conversations": as_messages(
                [("human" if name == "user" else "gpt", text) for name, text in TALK],
                "from",
                "value",
            )
        },
        {"conversations": as_messages(TALK)},
        {"instruction": "and?", "input": "", "output": "SO", "history": [["hi", "HO"]]},
        {"turns": [text for _, text in TALK]},
    ],
)
def test_each_shape_has_the_same_turns(row):
    assert read_turns(row) == [Turn(*turn) for turn in TALK]
    with_system = read_turns({"system": "be kind"} | row)
    if "turns" not in row:
        assert with_system == [Turn("system", "be kind"), *read_turns(row)]


def test_an_instruction_may_have_an_input():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert read_turns(row) == [Turn("user", "Add.\n1 2"), Turn("assistant", "3")]


def test_files_of_dialogues(tmp_path, tmp_path_factory):
    """Turns parted by a mark, turns a line, and YAML give the same corpus."""
    marked = tmp_path / "marked.txt"
    marked.write_text("hi __eou__ HO __eou__ and? __eou__ SO __eou__\ttopic\t1 2\nyo __eou__ YO\n")
    lined = tmp_path / "lined.txt"
    lined.write_text("hi\nHO\nand?\nSO\n\n\nyo\nYO\n")
    listed = tmp_path / "listed.yml"
    listed.write_text("categories: [x]\nconversations:\n- [hi, HO, 'and?', SO]\n- - yo\n  - YO\n")
    wanted = [as_row(TALK), as_row([("user", "yo"), ("assistant", "YO")])]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in wanted))
    packed = tmp_path / "lined2.txt.gz"
    packed.write_bytes(gzip.compress(lined.read_bytes()))

    found = []
    outputs = tmp_path_factory.mktemp("outputs")
    for path in (marked, lined, listed, rows, packed):
        out = prepare(
            outputs / f"out-{path.name}",
            f"--input={path}",
            "--task=chat",
            "--tokenizer=bytes+chat",
        )
        found.append(corpus.open_corpus(out).content)
        assert len(documents(out)["text"]["train"]) == 2
    assert len(set(found)) == 1

    # A folder's YAML is passed over, as before.
    assert {source.name for source in find_sources((str(tmp_path),))} == {
        f"{tmp_path.name}/{path.name}" for path in (marked, lined, rows, packed)
    }
    words = "listed.yml: holds dialogues, which --task=chat of prepare reads"
    refused(2, (words,), f"--input={listed}", f"--output={tmp_path / 'no'}")


@pytest.mark.parametrize(
    "content, words",
    [
        ("conversations: [[a, [b]]]", r"a.yml:1: turns\[1\] is list, expected text"),
        ("conversations: {a: b}", "a.yml: holds no list `conversations`"),
        ("conversations: [", "a.yml: not YAML"),
    ],
)
def test_yaml_that_holds_no_dialogues(tmp_path, content, words):
    (tmp_path / "a.yml").write_text(content)
    given = f"--input={tmp_path / 'a.yml'}", f"--output={tmp_path / 'out'}"
    line = refused(2, (), *given, "--task=chat", "--tokenizer=bytes+chat")
    assert re.search(words, line), line


# ---- what is learned ----


def test_the_assistant_is_learned_with_the_token_that_ends_it():
    spans = read(as_row([("system", "s"), *TALK]))
    assert whole_text(spans) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nHO<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
        "<|im_start|>assistant\nSO<|im_end|>"
    )
    assert learned_text(spans) == "HO[<|im_end|>]SO[<|im_end|>]"
    assert whole_text(read(as_row(TALK), ("system", "s"))) == whole_text(spans)


def test_ids_and_bits_of_a_conversation(tmp_path):
    """A name in a turn stays text, and the tokens of the form are the tokenizer's special ids."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(as_row([("user", "<|im_end|>"), ("assistant", "OK")])))
    out = prepare(tmp_path / "out", f"--input={path}", "--task=chat", "--tokenizer=bytes+chat")
    opened = corpus.open_corpus(out)
    tokens = opened.sources["text"]["train"]
    start, end = opened.tokenizer.specials["<|im_start|>"], opened.tokenizer.specials["<|im_end|>"]
    wanted = [start, *b"user\n<|im_end|>", end, *b"\n", start, *b"assistant\nOK", end, 256]
    assert tokens.ids(0, tokens.size).tolist() == wanted
    bits = np.empty(tokens.size, shards.LEARN)
    tokens.read_learn(0, bits)
    assert bits.tolist() == [0] * (len(wanted) - 4) + [1] * 4
    # Bytes are those of the text alone, so bits per byte are not flattered.
    assert tokens.bytes == len("user\n<|im_end|>\nassistant\nOK")


def test_a_tokenizer_of_chats_does_not_learn_the_names_of_special_tokens(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps(as_row([*TALK, ("user", str(i)), ("assistant", "X")])) + "\n"
            for i in range(200)
        )
    )
    for spec in ("bpe:300+chat", "char+chat"):
        out = prepare(tmp_path / spec, f"--input={path}", "--task=chat", f"--tokenizer={spec}")
        tokenizer = corpus.open_corpus(out).tokenizer
        assert not any(b"im_s" in piece for piece in tokenizer.pieces)
        assert documents(out)["text"]["train"][0].startswith("user\nhi\nassistant\nHO")


@pytest.mark.parametrize(
    "turns, words",
    [
        ([("user", "a"), ("user", "b")], "turn 2 is of user, expected assistant"),
        ([("assistant", "a"), ("user", "b")], "turn 1 is of assistant, expected user"),
        ([("system", "s"), ("assistant", "b")], "turn 2 is of assistant, expected user"),
        ([("user", "a"), ("system", "b")], "turn 2 is of system, expected assistant"),
        ([("user", "a"), ("robot", "b")], r"messages\[1\] has the unknown role 'robot'; known are"),
        ([("user", "a"), ("tool", "b")], r"messages\[1\] has the role 'tool', which is reserved"),
        ([("user", "a"), ("assistant", " ")], "turn 2, of assistant, is empty"),
        ([("user", "a")], "has no turn of the assistant"),
        ([], "has no turn of the assistant"),
    ],
)
def test_conversations_that_cannot_be_learned(turns, words):
    with pytest.raises(Unreadable, match=words):
        read(as_row(turns))


@pytest.mark.parametrize(
    "row, words",
    [
        ({"text": "a"}, "holds no conversation of --task=chat .* fields there: text"),
        ({"messages": "a"}, "'messages' of --task=chat holds str, expected a list"),
        ({"messages": ["a"]}, r"messages\[0\] is str, expected an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing; fields there: role"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, r"history\[0\]: expected a list"),
        ({"turns": ["a", 1]}, r"turns\[1\] is int, expected text"),
        (as_row(TALK) | {"system": 1}, "system holds int, expected text"),
    ],
)
def test_rows_of_another_shape(row, words):
    with pytest.raises(Unreadable, match=words):
        read(row)


def test_a_tokenizer_needs_the_tokens(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(as_row(TALK)))
    given = f"--input={path}", f"--output={tmp_path / 'out'}", "--task=chat"
    words = "writes the special token <|im_start|>, which --tokenizer=bytes lacks; give "
    refused(2, (words, "--tokenizer=bytes+chat"), *given)


# ---- templates ----

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' }}"
    "{{ '\\n' if not loop.last or not add_generation_prompt and m.role != 'assistant' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)
NAMES = json.dumps({"bos_token": "<|endoftext|>", "a": "<|im_start|>", "b": "<|im_end|>"})


@pytest.fixture
def sandbox():
    """The process that renders. It is ended after the test."""
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    yield
    template.stop()


def test_a_template_gives_the_spans_of_the_same_form(sandbox):
    options = ("template", CHATML), ("tokens", NAMES)
    assert read(as_row(TALK), *options) == read(as_row(TALK))


def test_what_a_template_writes_after_an_answer_is_not_learned(sandbox):
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    spans = read(as_row(TALK), ("template", text), ("tokens", NAMES))
    assert learned_text(spans) == "HO[<|im_end|>]SO[<|im_end|>]"
    assert whole_text(spans) == whole_text(read(as_row(TALK))) + "\n"


def test_the_template_of_a_tokenizer_folder(sandbox, tmp_path):
    """It is found beside the tokenizer, kept in the manifest, and its own tokens are special."""
    plain = prepare(
        tmp_path / "plain",
        f"--input={write_rows(tmp_path)}",
        "--task=chat",
        "--tokenizer=bpe:300+chat",
    )
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made = json.loads((plain / "tokenizer.json").read_text())
    made = json.loads(made["content"])
    first = len(made["model"]["vocab"])
    made["added_tokens"] += [
        {
            "id": first + i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, name in enumerate(("<|im_start|>", "<|im_end|>"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(made))
    text = "{{ bos_token }}" + CHATML
    settings = {"chat_template": text, "bos_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    given = f"--input={tmp_path / 'rows.jsonl'}", "--task=chat", f"--tokenizer={folder}"
    out = prepare(tmp_path / "out", *given)
    mine = corpus.open_corpus(out).sources["text"]["train"]
    wanted = corpus.open_corpus(plain).sources["text"]["train"]
    assert mine.ids(0, mine.size)[1:].tolist() == wanted.ids(0, wanted.size).tolist()
    assert corpus.read_manifest(out)["settings"]["task_options"]["template"] == text

    # The user may take another one.
    other = prepare(tmp_path / "other", *given, "--task_options", "template=chatml")
    mine = corpus.open_corpus(other).sources["text"]["train"]
    assert mine.ids(0, mine.size).tolist() == wanted.ids(0, wanted.size).tolist()


def write_rows(folder):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(as_row(TALK)) + "\n")
    return path


@pytest.mark.parametrize(
    "text, words",
    [
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ raise_exception('x' * 9999999) }}", "fails: ValueError: x{480,500}$"),
        ("{% for i in range(90000) %}{{ 'x' * 999 }}{% endfor %}", "writes more than"),
        (
            "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
            "{% endfor %}{{ ns.x }}",
            "memory",
        ),
        ("{{ messages | length }}", "writes earlier turns otherwise"),
    ],
)
def test_a_template_that_misbehaves(sandbox, text, words):
    with pytest.raises(Unreadable, match=words):
        read(as_row(TALK), ("template", text))


def test_a_template_that_never_ends(sandbox, monkeypatch):
    """Its process is ended, and the next row has another one."""
    monkeypatch.setattr(template, "SECONDS", 0.5)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(Unreadable, match=r"took more than 0\.5 s"):
        read(as_row(TALK), ("template", loop))
    monkeypatch.undo()
    assert read(as_row(TALK), ("template", CHATML))


def test_a_turn_may_not_name_a_special_token_of_a_template(sandbox):
    row = as_row([("user", "x<|im_end|>"), ("assistant", "B")])
    with pytest.raises(Unreadable, match="turn 1 holds the name of the special token "):
        read(row, ("template", CHATML), ("tokens", NAMES))


def test_a_template_that_is_not_there(tmp_path):
    path = write_rows(tmp_path)
    given = (
        f"--input={path}",
        f"--output={tmp_path / 'out'}",
        "--task=chat",
        "--tokenizer=bytes+chat",
    )
    words = "template=/nowhere/a.jinja: expected chatml, a .jinja file, or a folder"
    refused(2, (words,), *given, "--task_options", "template=/nowhere/a.jinja")
    words = ("writes bos_token, which is '<s>' in tokenizer_config.json, and the tokenizer has no",)
    settings = {"bos_token": "<s>", "chat_template": "{{ bos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    refused(2, words, *given, "--task_options", f"template={tmp_path}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    refused(2, ("holds no chat_template",), *given, "--task_options", f"template={tmp_path}")
