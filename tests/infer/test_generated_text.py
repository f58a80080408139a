"""Generated text has whole characters, and stops cut it to the letter."""

import numpy as np
import pytest
from generations import COMPUTE, make_model, run, silent

from gpt_jax.data.tokenizers.vocabulary import (
    StreamDecoder,
    Tokenizer,
    make_byte_tokenizer,
)
from gpt_jax.infer import decode
from gpt_jax.infer.decode import stream_text
from gpt_jax.infer.settings import Sampling
from gpt_jax.infer.text import Completion, first_stop, held_back


def scripted(monkeypatch, tokenizer, scripts):
    """A model whose rows say exactly these token ids."""
    table = np.zeros((len(scripts), 40), np.int32)
    for row, ids in zip(table, scripts, strict=True):
        row[: len(ids)] = ids
    monkeypatch.setattr(decode, "_start", lambda *args, **static: (1, table[:, 0]))
    monkeypatch.setattr(
        decode, "_next", lambda params, state, knobs, **static: (state + 1, table[:, state])
    )
    return make_model(vocab=tokenizer.vocab)


def test_characters_are_never_cut(monkeypatch):
    tokenizer = make_byte_tokenizer()
    text = "é我是🎉!"
    model = scripted(
        monkeypatch, tokenizer, [[*text.encode(), 256, 65, 65], [*"ab我".encode()[:4], 256, 66]]
    )
    sampling = Sampling(max_new_tokens=30, temperature=0.0)
    pieces = list(stream_text(model, COMPUTE, {}, tokenizer, ["x", "y"], sampling, silent))
    assert [p.text for p in pieces if p.row == 0] == [*text, ""]
    assert [p.text for p in pieces if p.row == 1] == ["a", "b", "�"]

    first, second = (p.completion for p in pieces if p.completion)
    assert sorted([first, second]) == [
        Completion(0, 0, tuple(text.encode()), text, "eot"),
        Completion(1, 0, tuple("ab我".encode()[:4]), "ab�", "eot"),
    ]


@pytest.mark.parametrize(
    "stops, text, finish",
    [
        (("ello",), "h", "stop"),
        (("lo0",), "hel", "stop"),
        (("lz",), "hello0world", "eot"),
        (("d5",), "hello0world", "eot"),  # held back at the end, then shown
        (("world", "o0w"), "hell", "stop"),
        (("o", "hello"), "", "stop"),
        (("h",), "", "stop"),
        ((), "hello0world", "eot"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_stop_strings_cut_exactly(monkeypatch, stops, text, finish, size):
    """Tokens of 1, 2 or 5 letters give the same text.

    The stream never shows what a stop string takes back.
    """
    said = "hello0world"
    words = [said[i : i + size] for i in range(0, len(said), size)]
    pieces = (*tuple(w.encode() for w in words), b"")

    def encode(texts):
        return [np.zeros(1, np.int32) for _ in texts]

    tokenizer = Tokenizer(
        "words", "words", "", pieces, len(words), encode, lambda text: iter((text,))
    )
    model = scripted(monkeypatch, tokenizer, [[*range(len(words) + 1), 0, 0]])
    sampling = Sampling(max_new_tokens=30, temperature=0.0, stop=stops)
    shown = list(stream_text(model, COMPUTE, {}, tokenizer, ["x"], sampling, silent))
    done = shown[-1].completion
    assert [p.completion for p in shown[:-1]] == [None] * (len(shown) - 1)
    assert "".join(p.text for p in shown) == done.text == text and done.finish == finish
    assert all(p.text for p in shown[:-1])


def test_stops_of_a_text():
    assert first_stop("abcd", ("bc", "abcd")) == 1 and first_stop("abcd", ("d", "cd")) == 2
    assert first_stop("abcd", ("x",)) is None and first_stop("abcd", ()) is None
    assert held_back("ab<", ("<end>",)) == 1 and held_back("ab<en", ("<end>", "n!")) == 3
    assert held_back("ab", ("c",)) == 0


def test_streamed_text_is_the_decoded_tokens():
    model = make_model(vocab=264)
    done = run(model, ["hé", "我是"], Sampling(max_new_tokens=20, seed=1), make_byte_tokenizer())
    for completion in done:
        decoder = StreamDecoder(make_byte_tokenizer())
        assert completion.text == "".join(map(decoder.feed, completion.tokens)) + decoder.flush()
        assert len(completion.text) > 5
