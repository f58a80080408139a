"""Text to ids and back: every kind of tokenizer against plain Python."""

import json
import random

import numpy as np
import pytest
import tokenizers

from gpt_jax.data.tokenizers import spec as tk, vocabulary
from gpt_jax.errors import UsageError

ENGLISH = "The quick brown fox, it's 42 years old,\r\n\tjumps  over   the lazy dog.\n\n\n" * 3
CHINESE = "我是一个程序员,我喜欢写代码。\n资治通鉴\u3000卷第一\n"
EMOJI = "👩‍👩‍👧 👍🏽 naïve cafe\u0301 \u2028 \ufeff \ufffd"
TEXTS = [ENGLISH, CHINESE, EMOJI, "", " ", "\n", ENGLISH + CHINESE + EMOJI, "a<|endoftext|>b"]


@pytest.fixture(scope="module")
def bpe():
    return tk.train_bpe([ENGLISH, CHINESE], 300)


def sentencepiece_json():
    """A tokenizer.json like that of Llama 2: spaces as ▁, byte fallback, unknown, </s>."""
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "▁a", "ab"]
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {p: i for i, p in enumerate(pieces)},
            [("▁", "a"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    library.add_special_tokens(["<unk>", "</s>"])
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    library.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )

    return library.to_str()


def every_kind(bpe):
    llama = tk.make_json_tokenizer(sentencepiece_json(), "llama")
    return [tk.make_byte_tokenizer(), tk.make_char_tokenizer("".join(TEXTS)), bpe, llama]


def test_round_trip_and_bytes_of_tokens(bpe):
    for tokenizer in every_kind(bpe):
        assert (
            tokenizer.token_bytes.shape == (tokenizer.vocab,)
            and tokenizer.token_bytes.dtype == np.int32
        )
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert ids.dtype == np.int32 and (
                not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab)
            )
            assert tokenizer.decode(ids) == text, tokenizer.name
            assert tokenizer.decode_bytes(ids) == text.encode()
            assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_a_tokenizer_that_would_drop_text_is_refused():
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(
        ["only these"], tokenizers.trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False)
    )
    with pytest.raises(
        UsageError, match=r"has no token for 2[0-9][0-9] of the bytes of UTF-8.*drop text"
    ):
        tk.make_json_tokenizer(library.to_str())


def test_special_text_is_ordinary_and_specials_stand_for_nothing(bpe):
    for tokenizer in every_kind(bpe):
        for text in ("<|endoftext|>", "</s>", "x<|endoftext|>"):
            if tokenizer.kind != "char":
                assert tokenizer.eot not in tokenizer.encode(text)
        if tokenizer.eot is not None:
            assert (
                tokenizer.token_bytes[tokenizer.eot] == 0
                and tokenizer.decode([tokenizer.eot]) == ""
            )

    assert tk.make_byte_tokenizer().eot == 256 and tk.make_byte_tokenizer().vocab == 257
    assert tk.make_char_tokenizer("ba").eot is None and tk.make_char_tokenizer("ba").encode(
        "ab"
    ).tolist() == [0, 1]


def test_decoding_never_raises(bpe):
    rng = random.Random(0)
    for tokenizer in every_kind(bpe):
        for _ in range(50):
            ids = [rng.randrange(-2, tokenizer.vocab + 50) for _ in range(rng.randrange(20))]
            raw = b"".join(tokenizer.pieces[i] for i in ids if 0 <= i < tokenizer.vocab)
            assert tokenizer.decode_bytes(ids) == raw and tokenizer.decode(ids) == raw.decode(
                "utf-8", "replace"
            )


def test_stream_decoder_gives_whole_characters_and_the_same_text(bpe):
    rng = random.Random(1)
    for tokenizer in every_kind(bpe):
        for ids in [tokenizer.encode(t) for t in TEXTS] + [
            [rng.randrange(tokenizer.vocab) for _ in range(60)]
        ]:
            decoder = vocabulary.StreamDecoder(tokenizer)
            parts = [decoder.feed(i) for i in ids]
            if tokenizer.decode(ids).count("\ufffd") == 0:
                assert not any("\ufffd" in part for part in parts)
            assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)
    decoder = vocabulary.StreamDecoder(tk.make_byte_tokenizer())

    assert [decoder.feed(b) for b in "我".encode()] == ["", "", "我"] and decoder.flush() == ""


def test_bpe_of_the_library_is_the_same_text_by_text(bpe):
    library = tokenizers.Tokenizer.from_str(bpe.content)
    for text in TEXTS[:-1]:
        assert bpe.encode(text).tolist() == library.encode(text).ids
        assert library.decode(bpe.encode(text).tolist()) == text
    assert len(bpe.encode(ENGLISH)) < len(ENGLISH.encode()) and bpe.vocab == 300
    again = tk.train_bpe([ENGLISH, CHINESE], 300)
    assert again.content == bpe.content and again.fingerprint == bpe.fingerprint


def test_parts_encode_as_the_whole(bpe, monkeypatch):
    monkeypatch.setattr(vocabulary, "PART", 7)
    rng = random.Random(2)

    for tokenizer in every_kind(bpe):
        for _ in range(40):
            text = "".join(
                rng.choice(
                    [
                        "a",
                        "b's",
                        " ",
                        "  ",
                        "\n",
                        "\r\n",
                        "\u3000",
                        "我",
                        ".",
                        "9",
                        "\t",
                        "\x1c",
                        "\x85",
                    ]
                )
                for _ in range(80)
            )
            if tokenizer.kind == "char":
                tokenizer = tk.make_char_tokenizer(text)
            parts = list(tokenizer.parts(text))
            assert "".join(parts) == text and (len(parts) > 1 or tokenizer.name == "llama")
            assert (
                np.concatenate([tokenizer.encode(p) for p in parts]).tolist()
                == tokenizer.encode(text).tolist()
            )


def test_json_carries_the_whole_tokenizer(bpe):
    for tokenizer in every_kind(bpe):
        again = tk.tokenizer_from_json(tokenizer.to_json())
        assert (again.name, again.vocab, again.eot, again.fingerprint, again.pieces) == (
            tokenizer.name,
            tokenizer.vocab,
            tokenizer.eot,
            tokenizer.fingerprint,
            tokenizer.pieces,
        )
        assert all((again.encode(t) == tokenizer.encode(t)).all() for t in TEXTS)

    assert len({t.fingerprint for t in every_kind(bpe)}) == 4
    assert tk.make_json_tokenizer(bpe.content, "other name").fingerprint == bpe.fingerprint


def test_a_path_is_read(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.content, encoding="utf-8")
    assert tk.read_tokenizer(str(path)).fingerprint == bpe.fingerprint


def test_unknown_character_is_named_with_its_place():
    with pytest.raises(UsageError, match=r"character 2, '我'.*3 that the char tokenizer knows"):
        tk.make_char_tokenizer("abc").encode("ab我")


def test_lone_surrogate_is_named(bpe):
    for tokenizer in every_kind(bpe):
        with pytest.raises(UsageError, match="character 1 is a lone surrogate"):
            tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("spec", ["bpe:256", "bpe:", "bpe:x", "bpe:-5"])
def test_impossible_bpe_size(spec):
    with pytest.raises(UsageError, match="at least 257"):
        tk.parse_tokenizer_spec(spec)


def test_bad_tokenizer_files(tmp_path, bpe):
    with pytest.raises(UsageError, match="expected bytes, char, bpe:N or the path"):
        tk.read_tokenizer("byts")

    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(UsageError, match=r"x.json: not a tokenizer.json"):
        tk.read_tokenizer(str(path))

    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"x.json"):
        tk.read_tokenizer(str(path))

    path.write_text(json.dumps(json.loads(bpe.content) | {"decoder": None}))
    with pytest.raises(UsageError, match=r"its decoder \(none\)"):
        tk.read_tokenizer(str(path))

    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    with pytest.raises(
        UsageError, match=r"mine: has no end-of-text token; add one of <\|endoftext\|>"
    ):
        tk.make_json_tokenizer(library.to_str(), "mine")
