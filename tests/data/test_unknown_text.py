"""Text that the tokenizer does not know.

It is counted while it is tokenized, told wherever it is used, and is no gain in bits per byte.
"""

import io

import prepared
import pytest
import runs

from gpt_jax import config
from gpt_jax.data.stream.batches import make_eval_batches
from gpt_jax.data.tokenizers.spec import resolve_tokenizer, tokenizer_from_json
from gpt_jax.data.tokenizers.vocabulary import make_byte_tokenizer
from gpt_jax.data.tokens import cache, corpus

KNOWN = "the cat sat on the mat "
LOST = "我是猫 ⁇ "
LINE = "of the text is lost to <unk>"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A SentencePiece model without byte fallback that has seen English alone."""
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="the extra sentencepiece is not installed"
    )
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([KNOWN * 20]),
        model_writer=out,
        vocab_size=30,
        hard_vocab_limit=False,
        eos_id=2,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("unknown") / "english.model"
    path.write_bytes(out.getvalue())

    return path


def lost_bytes(text):
    return sum(len(c.encode()) for c in text if c in LOST and c != " ")


def test_unknown_characters_are_counted_in_bytes_of_the_text(model):
    tokenizer = resolve_tokenizer(str(model))
    for text in (KNOWN, KNOWN + LOST, LOST * 3 + KNOWN, "我我我", ""):
        assert tokenizer.lost(text, tokenizer.encode(text)) == lost_bytes(text)
    again = tokenizer_from_json(tokenizer.to_json())
    assert again.unknown == tokenizer.unknown and again.token_bytes[tokenizer.unknown] == 0
    assert (
        make_byte_tokenizer().lost(LOST, make_byte_tokenizer().encode(LOST)) == 0
        and make_byte_tokenizer().unknown is None
    )


def test_a_run_is_told_and_bits_per_byte_are_of_what_is_left(model, tmp_path):
    text = (KNOWN * 3 + LOST) * 40
    (tmp_path / "a.txt").write_text(text)
    data = config.Data(
        path=(str(tmp_path / "a.txt"),), tokenizer=str(model), cache=str(tmp_path / "cache")
    )
    for _ in range(2):  # built, and found again
        said = []
        got = cache.prepare(data, resolve_tokenizer(data.tokenizer), said.append)
        assert (
            got.train.lost + got.eval.lost == lost_bytes(text)
            and got.train.lost > 8 * got.eval.lost > 0
        )
        assert (
            f"{got.train.lost / got.train.bytes:.2%} {LINE}" in said[-1]
            and said[-1].count(LINE) == 2
        )
        assert "bits per byte are of the rest" in said[-1]
    batches = make_eval_batches(got.eval, got.tokenizer, data, 16, 4, slice(0, 4))
    counted = sum(int(batch["bytes"].sum()) for batch in batches)
    assert 0 < counted <= got.eval.bytes - got.eval.lost

    (tmp_path / "b.txt").write_text(KNOWN * 90)
    known = config.Data(path=(str(tmp_path / "b.txt"),), cache=data.cache)
    cache.prepare(known, resolve_tokenizer(str(model)), said.append)
    assert LINE not in said[-1]


def test_prepare_tells_at_its_end_and_when_it_is_asked(model, tmp_path, capsys):
    source = prepared.write_jsonl(
        tmp_path / "a.jsonl", [f"{i} {KNOWN}{LOST if i % 3 else ''}" for i in range(60)]
    )
    folder = prepared.prepare(
        tmp_path / "out", f"--input={source}", f"--tokenizer={model}", "--eval_fraction=0.2"
    )
    said = capsys.readouterr().out
    assert "text/train: " in said and said.count(LINE) == 2

    sides = corpus.open_corpus(folder).sources["text"]
    assert sum(side.lost for side in sides.values()) == 40 * lost_bytes(LOST) + sum(
        sum(c.isdigit() for c in str(i)) for i in range(60)
    )

    runs.call("prepare", f"--inspect={folder}")
    assert capsys.readouterr().out.count(LINE) == 2
