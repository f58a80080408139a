"""Tokenizer files of every form, special tokens and batches, on small files of the tests."""

import base64
import io
import json
import random
import sys

import numpy as np
import pytest
import tokenizers

from gpt_jax.data.tokenizers import bpe, files, spec as tk, spelling, vocabulary
from gpt_jax.errors import UsageError

ENGLISH = "The quick brown fox's 12345 jumps,\r\n\tover   the lazy dog.\n\n\n It'll do: 3.14\n" * 3
CHINESE = "我是一个程序员,我喜欢写代码。\n资治通鉴\u3000卷第一\n"
TEXTS = [
    ENGLISH,
    CHINESE,
    "👩‍👩‍👧 naïve cafe\u0301 \u2028 \ufeff",
    "",
    " ",
    "a<|endoftext|>b<|fim_prefix|><|im_start|>",
]


@pytest.fixture(scope="module")
def trained():
    return {pattern: tk.train_bpe([ENGLISH, CHINESE], 300, pattern) for pattern in bpe.PATTERNS}


def write_ranks(path, tokens):
    path.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    )
    return str(path)


def ranks_of(tokenizer):
    """The tokens of a trained tokenizer in the order of their making, tiktoken's ranks."""
    return [piece for i, piece in enumerate(tokenizer.pieces) if i != tokenizer.eot]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A SentencePiece model like that of Llama 2.

    It has BPE, byte fallback and a space in front, and normalises nothing.
    """
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="the extra sentencepiece is not installed"
    )
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH, CHINESE]),
        model_writer=out,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        user_defined_symbols=["<sep>"],
    )
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(out.getvalue())

    return path


# ---- files ----


@pytest.mark.parametrize("pattern", bpe.PATTERNS)
def test_ranks_give_the_ids_of_tiktoken(trained, pattern, tmp_path):
    tiktoken = pytest.importorskip("tiktoken", reason="the extra test is not installed")
    tokens = ranks_of(trained[pattern])
    read = tk.read_tokenizer(write_ranks(tmp_path / "own.tiktoken", tokens) + f":{pattern}")
    regex = (
        bpe.PATTERNS[pattern].regex
        or r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    truth = tiktoken.Encoding(
        "own",
        pat_str=regex,
        special_tokens={},
        mergeable_ranks={t: i for i, t in enumerate(tokens)},
    )
    for text in TEXTS:
        assert (
            read.encode(text).tolist() == truth.encode_ordinary(text)
            and read.decode(read.encode(text)) == text
        )

    assert read.specials == {tk.EOT: len(tokens)} and read.eot == len(tokens)


def test_ranks_that_no_merging_leads_to(tmp_path):
    """They were put into a vocabulary by hand.

    They are found as whole words, or from any two tokens that spell them.
    """
    tiktoken = pytest.importorskip("tiktoken", reason="the extra test is not installed")
    rng = random.Random(0)
    letters = [bytes([i]) for i in range(256)]

    for seed in range(20):
        longer = {bytes(rng.choices(b"abc", k=rng.randrange(2, 6))) for _ in range(30)}
        tokens = letters + rng.sample(sorted(longer), len(longer))
        read = tk.read_tokenizer(write_ranks(tmp_path / "odd.tiktoken", tokens))
        truth = tiktoken.Encoding(
            "odd",
            pat_str=bpe.PATTERNS["cl100k"].regex,
            special_tokens={},
            mergeable_ranks={t: i for i, t in enumerate(tokens)},
        )
        texts = ["".join(rng.choices("abc ", k=40)) for _ in range(50)]
        found = [ids.tolist() for ids in read.encode_batch(texts)]
        assert (
            sum(a != b for a, b in zip(found, truth.encode_ordinary_batch(texts), strict=False))
            == 0
        )


def test_ranks_with_a_gap_keep_it_for_the_end_of_text(trained, tmp_path):
    lines = [
        base64.b64encode(t) + b" %d\n" % (i + (i >= 290))
        for i, t in enumerate(ranks_of(trained["gpt2"]))
    ]
    (tmp_path / "p50k.tiktoken").write_bytes(b"".join(lines))
    read = tk.read_tokenizer(str(tmp_path / "p50k.tiktoken:gpt2"))
    assert (read.eot, read.vocab, read.pieces[290]) == (290, 300, b"") and read.decode(
        read.encode(ENGLISH)
    ) == ENGLISH


def test_folders(trained, tmp_path):
    spec = json.loads(trained["gpt2"].content)
    vocab = json.dumps(spec["model"]["vocab"])
    merges = "\n".join(map(" ".join, spec["model"]["merges"]))
    for names, head in (
        (("encoder.json", "vocab.bpe"), "#version: 0.2\n"),
        (("vocab.json", "merges.txt"), ""),
    ):
        folder = tmp_path / names[0]
        folder.mkdir()
        (folder / names[0]).write_text(vocab, encoding="utf-8")
        (folder / names[1]).write_text(head + merges + "\n", encoding="utf-8")
        read = tk.read_tokenizer(str(folder))
        assert (read.pieces, read.eot) == (trained["gpt2"].pieces, trained["gpt2"].eot)
        assert all((read.encode(t) == trained["gpt2"].encode(t)).all() for t in TEXTS)
    (folder / "tokenizer.json").write_text(trained["digits"].content, encoding="utf-8")

    # A tokenizer.json comes before the two files of GPT-2.
    assert tk.read_tokenizer(str(folder)).fingerprint == trained["digits"].fingerprint


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.tiktoken", b"IQ== 0\nnot-base64! 1\n", "line 2, b'not-base64! 1'"),
        ("a.tiktoken", b"IQ==\n", "line 1"),
        ("a.tiktoken", b"IQ== 0\nIg== 0\n", "the same rank"),
        ("a.tiktoken", b"IQ== 0\n", "no token for 242 of the bytes"),
        ("a.tiktoken", base64.b64encode(tk.EOT.encode()) + b" 0\n", r"ranks hold <\|endoftext\|>"),
        ("a.tiktoken", b"", "no token for 243"),
        ("a.model", b"nonsense", "not a SentencePiece model"),
        ("a.model", b"", "a.model: not a SentencePiece model"),
    ],
)
def test_files_that_are_none(name, content, message, tmp_path):
    if name.endswith(".model"):
        pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        tk.read_tokenizer(str(tmp_path / name))


@pytest.mark.parametrize(
    "vocab, merges",
    [("[]", ""), ("{", ""), ('{"a": "x"}', ""), ('{"a": 0}', "a b c\n"), ('{"a": 0}', "a b\n")],
)
def test_folders_that_hold_nonsense(vocab, merges, tmp_path):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(
        UsageError, match=r"vocab.json and merges.txt are not|not a tokenizer.json|no end-of-text"
    ):
        tk.read_tokenizer(str(tmp_path))


# ---- SentencePiece ----


def test_a_llama_gives_the_ids_of_its_package_and_every_text_back(llama):
    import sentencepiece

    truth = sentencepiece.SentencePieceProcessor(model_file=str(llama))
    read = tk.read_tokenizer(str(llama.parent))
    texts = [*TEXTS, " two spaces before", "  ", "<0x41> ☃ \x00 <s></s><sep>"]
    for text, ids in zip(texts, read.encode_batch(texts), strict=False):
        assert ids.tolist() == truth.encode(text) and read.decode(ids) == text == truth.decode(
            ids.tolist()
        )
    assert read.prefix == b" " and read.decode_bytes(read.encode("The")) == b" The"
    assert read.specials == {"<s>": 1, "</s>": 2} and read.eot == 2 and not read.lossless
    assert (
        read.decode([1, 2]) == ""
        and read.token_bytes[:3].tolist() == [0, 0, 0]
        and read.unknown == 0
    )
    assert list(read.parts(ENGLISH)) == [ENGLISH]  # a part would get a space in front
    with pytest.raises(UsageError, match="character 1 is a lone surrogate"):
        read.encode("a\ud800")


def test_a_json_that_puts_a_space_in_front_takes_it_away():
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    normal = tokenizers.normalizers
    decode = tokenizers.decoders
    library.normalizer = normal.Sequence([normal.Prepend("▁"), normal.Replace(" ", "▁")])
    library.decoder = decode.Sequence(
        [decode.Replace("▁", " "), decode.ByteFallback(), decode.Fuse(), decode.Strip(" ", 1, 0)]
    )
    read = tk.make_json_tokenizer(library.to_str())
    for text in ("a", " a", "  我", "", "b\n"):
        assert read.decode(read.encode(text)) == text == library.decode(read.encode(text).tolist())

    assert not read.lossless


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "a.model").write_bytes(b"any")
    with pytest.raises(
        UsageError, match=r"a.model: needs the package sentencepiece; .* -m pip install"
    ):
        tk.read_tokenizer(str(tmp_path / "a.model"))


# ---- special tokens ----


def every_kind(trained, llama):
    return [
        tk.make_byte_tokenizer(),
        tk.make_char_tokenizer("".join(TEXTS)),
        *trained.values(),
        tk.read_tokenizer(str(llama)),
    ]


def test_special_tokens_keep_their_ids(trained, llama):
    for plain in every_kind(trained, llama):
        first = tk.with_specials(plain, vocabulary.FIM_TOKENS)
        both = tk.with_specials(
            first, [*vocabulary.FIM_TOKENS, *vocabulary.CHAT_TOKENS, *plain.specials]
        )
        size = plain.vocab
        assert first.specials == {
            **plain.specials,
            **{name: size + i for i, name in enumerate(vocabulary.FIM_TOKENS)},
        }
        assert first.vocab == size + 3
        assert both.specials == {**first.specials, "<|im_start|>": size + 3, "<|im_end|>": size + 4}
        assert both.eot == plain.eot and both.vocab == size + 5 == len(both.token_bytes)
        again = tk.tokenizer_from_json(both.to_json())
        assert (again.specials, again.pieces, again.fingerprint) == (
            both.specials,
            both.pieces,
            both.fingerprint,
        )
        assert len({t.fingerprint for t in (plain, first, both)}) == 3
        assert tk.with_specials(first, vocabulary.FIM_TOKENS).fingerprint == first.fingerprint
        for text in TEXTS:  # never made from text, and nothing else changes
            assert (both.encode(text) == plain.encode(text)).all()
        assert both.decode([size, size + 4, *plain.encode("a")]).strip() == "a"


def test_a_tokenizer_without_more_special_tokens_is_saved_as_ever(trained):
    plain = trained["gpt2"]
    assert json.loads(plain.to_json()) == {
        "kind": "json",
        "name": "bpe:300",
        "content": plain.content,
    }
    assert tk.with_specials(plain, [tk.EOT]).fingerprint == plain.fingerprint


def test_special_tokens_of_a_file_keep_their_ids_and_are_never_made_from_text(trained):
    spec = json.loads(trained["gpt2"].content)
    flags = spec["added_tokens"][0]
    spec["added_tokens"] += [
        {**flags, "id": 300, "content": "<|fim_suffix|>", "special": False},  # as in Qwen 2.5
        {**flags, "id": 301, "content": "<|im_end|>", "special": True},
        {**flags, "id": 302, "content": "<tool>", "special": False},
    ]
    read = tk.with_specials(tk.make_json_tokenizer(json.dumps(spec)), vocabulary.FIM_TOKENS)
    assert read.specials == {
        tk.EOT: 0,
        "<|fim_suffix|>": 300,
        "<|im_end|>": 301,
        "<|fim_prefix|>": 303,
        "<|fim_middle|>": 304,
    }

    text = "<|fim_suffix|><|im_end|><|fim_prefix|>"
    assert (
        read.encode(text).max() < 300
        and read.decode(read.encode(text)) == text
        and read.decode([300, 301]) == ""
    )
    assert read.encode("<tool>").tolist() == [302] and read.decode([302]) == "<tool>"
    with pytest.raises(UsageError, match="'<tool>': is an ordinary token"):
        tk.with_specials(read, ["<tool>"])


# ---- many texts at once, and any ids ----


def test_a_batch_is_its_texts(trained, llama):
    for tokenizer in every_kind(trained, llama):
        found = tokenizer.encode_batch(TEXTS)
        assert all(
            ids.dtype == np.int32 and (ids == tokenizer.encode(text)).all()
            for ids, text in zip(found, TEXTS, strict=False)
        )
        assert len(found) == len(TEXTS) and tokenizer.encode_batch([]) == []
        with pytest.raises(UsageError, match=r"text 'a[^c]*character 1 is a lone surrogate"):
            tokenizer.encode_batch(["b", "a\ud800"])


def test_decoding_any_ids_never_raises(trained, llama):
    rng = random.Random(0)
    for tokenizer in every_kind(trained, llama):
        tokenizer = tk.with_specials(tokenizer, vocabulary.CHAT_TOKENS)
        for _ in range(100):
            ids = [rng.randrange(-2, tokenizer.vocab + 50) for _ in range(rng.randrange(20))]
            decoder = vocabulary.StreamDecoder(tokenizer)
            streamed = "".join([*map(decoder.feed, ids), decoder.flush()])
            assert streamed == tokenizer.decode_bytes(ids).decode("utf-8", "replace")
            assert tokenizer.decode(ids) == streamed.removeprefix(tokenizer.prefix.decode())


def test_letters_of_bytes_are_those_of_the_library():
    assert set(spelling.make_byte_alphabet()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert files.LETTERS[32] == "Ġ"


def test_ranks_whose_pattern_is_not_known_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "O200K", 256)
    path = tmp_path / "o.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    with pytest.raises(
        UsageError, match=r"o.tiktoken: these are the ranks of o200k_base.*its ids would be wrong"
    ):
        files.read_tiktoken(path)


def test_half_of_a_pair_means_the_pair_and_a_packed_file_is_refused(trained, tmp_path):
    spec = json.loads(trained["gpt2"].content)["model"]
    (tmp_path / "encoder.json").write_text(json.dumps(spec["vocab"]))
    with pytest.raises(
        UsageError, match=r"is read together with vocab.bpe, which is not beside it"
    ):
        tk.read_tokenizer(str(tmp_path / "encoder.json"))

    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["merges"]]
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    found = {
        tk.read_tokenizer(str(path)).fingerprint
        for path in (tmp_path, tmp_path / "encoder.json", tmp_path / "vocab.bpe")
    }
    assert len(found) == 1

    (tmp_path / "a.tiktoken.xz").write_bytes(b"packed")
    with pytest.raises(UsageError, match=r"a.tiktoken.xz: is compressed; decompress it first"):
        tk.read_tokenizer(str(tmp_path / "a.tiktoken.xz"))
