"""Tokenizers against what others publish for the same files.

The files are those of GPT-2, GPT-4 (tiktoken), SentencePiece, Pythia and CS336. GPT_JAX_TEST_DATA
names the folder that holds them. Without it these tests are skipped.
"""

import base64
import itertools
import json
import lzma
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from gpt_jax.data.tokenizers import spec as tk, vocabulary
from gpt_jax.data.tokenizers.spelling import make_byte_alphabet

DATA = Path(os.environ.get("GPT_JAX_TEST_DATA") or "/nonexistent")
TRUTH = DATA / "tokenizers"
pytestmark = pytest.mark.skipif(
    not TRUTH.is_dir(),
    reason="no tokenizers to compare with: give GPT_JAX_TEST_DATA=DIR, where DIR/tokenizers exists",
)
LANGUAGES = (
    "tokenizers/cs336/german.txt",
    "tokenizers/cs336/address.txt",
    "tokenizers/cs336/tinystories_sample.txt",
    "lm_en/cs336_corpus.en",
    "lm_en/c4_demo.jsonl",
    "lm_en/names.txt",
    "lm_en/arxiv_sample.jsonl.xz",
    "lm_en/wiki_demo.txt.xz",
    "lm_zh/cluecorpussmall_sampled.txt.xz",
    "lm_zh/hongloumeng.txt.xz",
    "lm_zh/zizhitongjian_modern.txt.xz",
    "mt_zh_en/tatoeba_cmn_eng.tsv.xz",
    "tokenizers/spm/botchan.txt",
)


def read(name: str, limit: int = -1) -> str:
    """The first characters of a data file, compressed or not."""
    with (lzma.open if name.endswith(".xz") else open)(
        DATA / name, "rt", encoding="utf-8", newline=""
    ) as file:
        return file.read(limit)


@pytest.fixture(scope="module")
def texts():
    found = {name: read(name, 60_000) for name in LANGUAGES}
    assert all(found.values())
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The shared files as a user has them, not compressed."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "gpt2").mkdir()
    (folder / "gpt2/encoder.json").write_bytes(lzma.open(TRUTH / "gpt2/encoder.json.xz").read())
    (folder / "gpt2/vocab.bpe").write_bytes((TRUTH / "gpt2/vocab.bpe").read_bytes())
    (folder / "cl100k_base.tiktoken").write_bytes(
        lzma.open(TRUTH / "tiktoken/cl100k_base.tiktoken.xz").read()
    )
    (folder / "pythia.json").write_bytes(
        lzma.open(TRUTH / "hf/pythia_20B_tokenizer.json.xz").read()
    )
    (folder / "botchan.model").write_bytes((TRUTH / "spm/test_model.model").read_bytes())
    return folder


@pytest.fixture(scope="module")
def gpt2(files):
    return tk.read_tokenizer(str(files / "gpt2"))


@pytest.fixture(scope="module")
def cl100k(files):
    return tk.read_tokenizer(str(files / "cl100k_base.tiktoken"))


@pytest.fixture(scope="module")
def botchan(files):
    pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    return tk.read_tokenizer(str(files / "botchan.model"))


@pytest.fixture(scope="module")
def pythia(files):
    return tk.read_tokenizer(str(files / "pythia.json"))


def test_gpt2_gives_the_ids_of_llama_cpp_s_cases(gpt2):
    given = (
        (TRUTH / "gguf/ggml-vocab-gpt-2.gguf.inp")
        .read_bytes()
        .decode()
        .split("\n__ggml_vocab_test__\n")
    )
    wanted = [
        [int(i) for i in line.split()]
        for line in (TRUTH / "gguf/ggml-vocab-gpt-2.gguf.out").read_text().split("\n")
    ]

    assert len(given) == len(wanted) == 47
    assert [ids.tolist() for ids in gpt2.encode_batch(given)] == wanted
    assert [gpt2.decode(ids) for ids in wanted] == given
    assert (gpt2.vocab, gpt2.eot, gpt2.specials) == (50257, 50256, {tk.EOT: 50256})
    assert gpt2.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]


def test_cl100k_gives_the_ids_of_tiktoken(cl100k, files, texts):
    tiktoken = pytest.importorskip("tiktoken", reason="the extra test is not installed")
    lines = (files / "cl100k_base.tiktoken").read_bytes().split(b"\n")[:-1]
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    # From tiktoken_ext/openai_public.py.
    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| "
        r"?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
        r"\s*[\r\n]|\s+(?!\S)|\s"
    )
    truth = tiktoken.Encoding("cl100k", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    for name, text in texts.items():
        assert cl100k.encode(text).tolist() == truth.encode_ordinary(text), name
    odd = [f"a{chr(i)}b 1{chr(i)}2 '{chr(i)} {chr(i)}\n" for i in range(0, 0x3200)]
    assert [ids.tolist() for ids in cl100k.encode_batch(odd)] == truth.encode_ordinary_batch(odd)

    rng = random.Random(0)
    letters = [*"abstSrReEvVmMlLdD''''   \n\r\t0123,.!我，ſé\u3000\x85👍\x1c"]
    mixed = ["".join(rng.choice(letters) for _ in range(rng.randrange(60))) for _ in range(2000)]
    assert [ids.tolist() for ids in cl100k.encode_batch(mixed)] == truth.encode_ordinary_batch(
        mixed
    )
    # These are the ids of cl100k_base.
    assert cl100k.specials == {
        tk.EOT: 100257,
        "<|fim_prefix|>": 100258,
        "<|fim_middle|>": 100259,
        "<|fim_suffix|>": 100260,
        "<|endofprompt|>": 100276,
    }
    assert cl100k.eot == 100257 and cl100k.vocab == 100277


def test_sentencepiece_gives_the_ids_and_text_of_its_package(botchan, files):
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="the extra sentencepiece is not installed"
    )
    truth = sentencepiece.SentencePieceProcessor(model_file=str(files / "botchan.model"))
    text = read(LANGUAGES[-1])
    for given in (text, *text.split("\n")[:2000], "", " ", "Ｆｕｌｌ  width ﬁ </s> <s>", "我"):
        ids = botchan.encode(given)
        assert ids.dtype == np.int32 and ids.tolist() == truth.encode(given)
        assert botchan.decode(ids) == truth.decode(ids.tolist())
    assert botchan.decode(botchan.encode("line one\nΩ.")) == "line one ⁇ ." and not botchan.lossless
    assert botchan.eot == truth.eos_id() and botchan.specials == {"<s>": 1, "</s>": 2}

    again = tk.tokenizer_from_json(botchan.to_json())
    assert (
        again.fingerprint == botchan.fingerprint
        and (again.encode(text) == botchan.encode(text)).all()
    )


def test_pythia_gives_the_ids_of_the_library(pythia, files, texts):
    truth = tokenizers.Tokenizer.from_file(str(files / "pythia.json"))
    truth.encode_special_tokens = True  # one of the texts holds <|endoftext|>
    for name, text in texts.items():
        assert pythia.encode(text).tolist() == truth.encode(text).ids, name
    # It normalises by NFC.
    assert (
        pythia.eot == 0 and not pythia.lossless and pythia.decode(pythia.encode("e\u0301")) == "é"
    )


def test_round_trips_in_every_language(gpt2, cl100k, texts):
    trained = [
        tk.train_bpe(list(texts.values())[:4], 400, pattern)
        for pattern in ("gpt2", "cl100k", "digits")
    ]
    for tokenizer in (gpt2, cl100k, *trained):
        assert tokenizer.lossless
        for ids, text in zip(
            tokenizer.encode_batch(list(texts.values())), texts.values(), strict=False
        ):
            assert tokenizer.decode(ids) == text, tokenizer.name


def test_decoding_any_ids_never_raises(gpt2, cl100k, botchan, pythia):
    rng = random.Random(0)
    for tokenizer in (gpt2, cl100k, botchan, pythia):
        for _ in range(200):
            ids = [rng.randrange(-2, tokenizer.vocab + 50) for _ in range(rng.randrange(20))]
            decoder = vocabulary.StreamDecoder(tokenizer)
            streamed = "".join([*map(decoder.feed, ids), decoder.flush()])
            assert streamed == tokenizer.decode_bytes(ids).decode("utf-8", "replace")
            assert tokenizer.decode(ids) == streamed.removeprefix(tokenizer.prefix.decode())


def replayed(words: Counter, merges: list[tuple[str, str]]):
    """For each merge (the greatest count of a pair at that time, the pairs of that count)."""
    words = [(list(word), count) for word, count in words.items()]
    pairs = Counter()

    def add(parts, count):
        for pair in itertools.pairwise(parts):
            pairs[pair] += count

    for parts, count in words:
        add(parts, count)
    for merge in merges:
        most = max(pairs.values())
        yield most, {pair for pair, count in pairs.items() if count == most}
        for parts, count in words:
            if merge[0] in parts and merge[1] in parts:
                add(parts, -count)
                for at in range(len(parts) - 1):
                    if tuple(parts[at : at + 2]) == merge:
                        parts[at : at + 2] = ["".join(merge)]
                add(parts, count)


def test_training_makes_cs336_s_choices_up_to_ties():
    """Ties are the only difference, because every merge of either is a most frequent pair.

    Of those pairs the reference merges the one of the greatest bytes, and the library the one of
    the lowest ids.
    """
    text = read("lm_en/cs336_corpus.en")
    trained = json.loads(tk.train_bpe([text], 500).content)["model"]
    ours = [tuple(pair) for pair in trained["merges"]]
    vocab = trained["vocab"]
    wanted = json.loads(
        (TRUTH / "cs336/train-bpe-reference-vocab.json").read_text(encoding="utf-8")
    )
    theirs = [
        tuple(line.split(" "))
        for line in (TRUTH / "cs336/train-bpe-reference-merges.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    words = Counter(
        w
        for w, _ in tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(
            text
        )
    )
    letters = make_byte_alphabet()

    def as_bytes(pair):
        return tuple(bytes(letters[c] for c in token) for token in pair)

    def as_ids(pair):
        return tuple(vocab[token] for token in pair)

    of_ours, of_theirs = (list(replayed(words, merges)) for merges in (ours, theirs))
    assert [max(ties, key=as_bytes) for _, ties in of_theirs] == theirs and len(theirs) == 243
    assert [min(ties, key=as_ids) for _, ties in of_ours] == ours
    # The same pairs, some in another order, until "124" can be made of 12 and 4 or of 1 and 24.
    assert [most for most, _ in of_ours[:219]] == [most for most, _ in of_theirs[:219]]
    assert len(set(ours) & set(theirs)) == 239 and ("12", "4") in ours and ("1", "24") in theirs
    order = [sorted(v, key=v.get) for v in (vocab, wanted)]
    assert order[0][:257] == order[1][:257] and len(vocab) == len(wanted) == 500
    assert order[0][257:] == ["".join(pair) for pair in ours] and order[1][257:] == [
        "".join(pair) for pair in theirs
    ]
