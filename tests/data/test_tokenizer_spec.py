"""Tokenizer specs, and the patterns by which BPE cuts text into words."""

import json
import random

import prepared
import pytest
import runs

from gpt_jax import config
from gpt_jax.data.tokenizers import bpe, spec as tk, vocabulary
from gpt_jax.data.tokens import cache, corpus
from gpt_jax.errors import UsageError
from gpt_jax.run import parts

ENGLISH = "The quick brown fox's 12345 jumps,\r\n\tover   the lazy dog.\n\n\n It'll do: 3.14\n" * 3
CHINESE = "我是一个程序员,我喜欢写代码。\n资治通鉴\u3000卷第一\n"


@pytest.fixture(scope="module")
def trained():
    return {pattern: tk.train_bpe([ENGLISH, CHINESE], 300, pattern) for pattern in bpe.PATTERNS}


# ---- specs ----


def test_spec_in_parts():
    chat = vocabulary.CHAT_TOKENS
    fim = vocabulary.FIM_TOKENS
    parts = {
        "": ("", 0, "", ()),
        "char": ("char", 0, "", ()),
        "bpe:4_096": ("bpe", 4096, "gpt2", ()),
        "bpe:4096:digits+chat+fim": ("bpe", 4096, "digits", chat + fim),
        "bytes+fim": ("bytes", 0, "", fim),
        "c++/a+b.json+fim": ("c++/a+b.json", 0, "", fim),
    }
    for spec, expected in parts.items():
        assert tk.parse_tokenizer_spec(spec) == (spec, *expected)


def test_what_is_made_from_the_text_stays_a_spec():
    assert tk.resolve_tokenizer("").fingerprint == tk.resolve_tokenizer("bytes").fingerprint
    for spec in ("char+fim", "bpe:300:cl100k"):
        assert tk.resolve_tokenizer(spec) == tk.parse_tokenizer_spec(spec)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("bpe:4096:gpt3", "unknown pattern 'gpt3'; choose one of gpt2, cl100k, digits"),
        ("bpe:4096:", "unknown pattern ''"),
        ("bpe:4096+fmi", r"\+fmi adds nothing known; choose from \+chat, \+fim"),
        ("bytes+", r"\+ adds nothing known"),
        ("bpe:9+fim", "at least 257"),
        ("bpe", "expected bytes, char, bpe:N or the path"),
        ("none.json+fmi", "none.json.fmi.*No such file"),
        ("none.tiktoken:gpt2", "No such file"),
        ("none.tiktoken:x", "unknown pattern; choose one of gpt2"),
        (".", "the folder holds none of tokenizer.json, enc"),
    ],
)
def test_impossible_specs(spec, message):
    with pytest.raises(UsageError, match=message):
        tk.resolve_tokenizer(spec, "--tokenizer")


def test_what_is_made_from_the_text_is_named_as_its_spec():
    made = tk.make_tokenizer(tk.resolve_tokenizer("bpe:290:digits+fim"), lambda: [ENGLISH])
    assert (
        made.name == "bpe:290:digits+fim"
        and made.vocab == 293
        and tk.tokenizer_from_json(made.to_json()).name == made.name
    )
    letters = tk.make_tokenizer(tk.resolve_tokenizer("char+chat"), lambda: [], "ba")
    assert letters.specials == {"<|im_start|>": 2, "<|im_end|>": 3} and letters.encode(
        "ab"
    ).tolist() == [0, 1]


def test_a_run_with_special_tokens_finds_its_cache_again(tmp_path):
    (tmp_path / "a.txt").write_text(ENGLISH, newline="")

    for spec in ("char+fim", "bpe:290:digits+fim", "bytes+fim"):
        data = config.Data(
            path=(str(tmp_path / "a.txt"),), cache=str(tmp_path / "cache"), tokenizer=spec
        )
        built, found = [
            cache.prepare(data, tk.resolve_tokenizer(spec), lambda line: None) for _ in range(2)
        ]
        assert built.folder == found.folder and built.tokenizer.specials == found.tokenizer.specials
        assert [*found.tokenizer.specials][-3:] == list(vocabulary.FIM_TOKENS)
        ids = [side.ids(0, side.size) for side in (found.train, found.eval)]
        assert "".join(map(found.tokenizer.decode, ids)) == ENGLISH


# ---- patterns ----


def words(pattern, text):
    return [text[a:b] for _, (a, b) in bpe.make_pre_tokenizer(pattern).pre_tokenize_str(text)]


def test_patterns_split_as_their_models_do():
    text = "it'S 12345 ok,我们 go!\n\n x"

    assert words("gpt2", text) == [
        "it",
        "'",
        "S",
        " 12345",
        " ok",
        ",",
        "我们",
        " go",
        "!",
        "\n\n",
        " x",
    ]
    assert words("cl100k", text) == [
        "it",
        "'S",
        " ",
        "123",
        "45",
        " ok",
        ",我们",
        " go",
        "!\n\n",
        " x",
    ]
    assert words("digits", text) == [
        "it",
        "'S",
        " ",
        *"12345",
        " ok",
        ",我们",
        " go",
        "!\n\n",
        " x",
    ]


def test_every_number_of_one_length_has_as_many_tokens_with_digits():
    made = tk.train_bpe(["2024 2024 2024 2023 2023 1999 "] * 9, 300, "digits")
    assert {len(made.encode(str(i))) for i in range(1000, 1100)} == {4}


@pytest.mark.parametrize("pattern", bpe.PATTERNS)
def test_parts_encode_as_the_whole(trained, pattern, monkeypatch):
    monkeypatch.setattr(vocabulary, "PART", 5)
    rng = random.Random(2)
    cut = 0
    letters = [*"a' 我\n\r.,。\t\u3000\x1c\x85", "b's", "  ", "\r\n", "9", "42"]
    for _ in range(300):
        text = "".join(rng.choice(letters) for _ in range(60))
        parts = list(trained[pattern].parts(text))
        assert "".join(parts) == text
        assert words(pattern, text) == [word for part in parts for word in words(pattern, part)]
        cut += len(parts)

    assert cut > 1500  # and it does cut: five times a text at least
    # Chinese has no spaces, so it is cut at the ends of lines.
    assert len(list(trained[pattern].parts("我们。\n" * 50))) > 20


def test_parts_of_what_may_look_across_a_cut_are_one(trained):
    spec = json.loads(trained["cl100k"].content)
    long = "a b " * 100_000
    spanning = {**spec["added_tokens"][0], "id": 300, "content": "b a", "special": False}
    in_front = {
        **spec["pre_tokenizer"]["pretokenizers"][1],
        "add_prefix_space": True,
        "use_regex": True,
    }
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": [*spec["added_tokens"], spanning]},
        {"pre_tokenizer": in_front},
    ):
        assert len(list(tk.make_json_tokenizer(json.dumps(spec | change)).parts(long))) == 1

    assert len(list(trained["cl100k"].parts(long))) > 1


# ---- one parse ----


@pytest.fixture
def parses(monkeypatch):
    """A list of the specs that are parsed while a test runs."""
    seen = []
    parse = tk.parse_tokenizer_spec

    def noting_parse(spec, *given):
        seen.append(spec)
        return parse(spec, *given)

    monkeypatch.setattr(tk, "parse_tokenizer_spec", noting_parse)
    return seen


@pytest.mark.parametrize("spec", ["char", "bpe:300", "bytes+fim"])
def test_a_build_takes_its_tokenizer_spec_apart_once(tmp_path, parses, spec):
    lines = [f"{i} {ENGLISH!r}\n" for i in range(50)]
    (tmp_path / "text.txt").write_text("".join(lines))
    config = runs.load(
        tmp_path,
        f"--config.data.tokenizer={spec}",
        "--config.data.documents=line",
        "--config.data.fim=0.1" if spec.endswith("+fim") else "--config.data.fim=0",
    )

    built = parts.build(config, lambda line: None)

    assert built.data.parts[0].train.documents > 40
    assert parses == [spec]


@pytest.mark.parametrize("spec", ["char", "bpe:300", "bytes+fim"])
def test_a_prepare_takes_its_tokenizer_spec_apart_once(tmp_path, parses, spec):
    prepared.write_jsonl(tmp_path / "in.jsonl", prepared.texts(200))

    folder = prepared.prepare(
        tmp_path / "out",
        f"--input={tmp_path / 'in.jsonl'}",
        f"--tokenizer={spec}",
        "--dedup=exact",
        "--piece_mb=0.005",
    )

    manifest = corpus.read_manifest(folder)
    assert manifest["sources"]["text"]["train"]["documents"] == 200
    assert len(manifest["sources"]["text"]["train"]["shards"]) > 3
    assert parses == [spec]
