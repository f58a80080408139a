"""What a tokenizer file must keep to: no text becomes a special token, no field is passed over."""

import io
import json
from dataclasses import replace

import prepared
import pytest
import tokenizers
from prepared import prepare, write_jsonl

from gpt_jax import config
from gpt_jax.data.tokenizers import json_fields, promises, spec as tk
from gpt_jax.data.tokens import cache
from gpt_jax.errors import UsageError

TEXT = "price was <s>10</s> euro <|endoftext|> now 9"
ENGLISH = "The quick brown fox's 12345 jumps,\r\n\tover   the lazy dog.\n\n\n It'll do: 3.14\n"
BYTES = tokenizers.pre_tokenizers.ByteLevel
NOTE = "makes special tokens of the plain text"


def train_library(words, specials=(), pre_tokenizer=None):
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = pre_tokenizer or BYTES(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(specials),
        initial_alphabet=BYTES.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(words, trainer)
    return library


def make_added():
    """End of text is an added token, and not a special one."""
    library = train_library(["the cat", "a dog"] * 50)
    library.add_tokens(["<|endoftext|>"])
    return library.to_str()


def make_merged():
    """Merges lead to the special tokens, and go on from one of them."""
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?\S+|\s+"), "isolated")
    by_words = tokenizers.pre_tokenizers.Sequence(
        [words, BYTES(add_prefix_space=False, use_regex=False)]
    )
    texts = ["<s>abc</s>", "xy </s> w", "</s>z"] * 50
    return train_library(texts, ["</s>", "<s>"], by_words).to_str()


def make_whole_words():
    """The model takes a word that is a token as it stands, without merging."""
    spec = json.loads(make_merged())
    spec["model"] |= {"ignore_merges": True, "merges": []}
    return json.dumps(spec)


def make_unigram():
    """Special tokens are pieces of the model, of score 0."""
    library = tokenizers.Tokenizer(tokenizers.models.Unigram())
    library.pre_tokenizer = BYTES(add_prefix_space=False, use_regex=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        initial_alphabet=BYTES.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(["the cat sat or", "a dog yes"] * 50, trainer)
    return library.to_str()


FILES = {
    "added": make_added,
    "merged": make_merged,
    "whole words": make_whole_words,
    "unigram": make_unigram,
}


def write_sentencepiece(path):
    sentencepiece = pytest.importorskip(
        "sentencepiece", reason="the extra sentencepiece is not installed"
    )
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([ENGLISH] * 20),
        model_writer=out,
        vocab_size=340,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        user_defined_symbols=["<s>", "</s>"],
    )
    path.write_bytes(out.getvalue())
    return path


# ---- special tokens ----


def check_no_special(tokenizer):
    """Text gives no special id, comes back, and all of its bytes are counted."""
    specials = set(tokenizer.specials.values())
    for text in (TEXT, "</s>", "<|endoftext|>", "a</s>z <unk>", "<s></s>" * 3):
        ids = tokenizer.encode(text)
        assert not specials.intersection(ids.tolist()), text
        assert tokenizer.decode(ids) == text
        size = len((tokenizer.prefix.decode() + text).encode())
        assert tokenizer.token_bytes[ids].sum() == size


@pytest.mark.parametrize("name", FILES)
def test_no_text_becomes_a_special_token(name):
    content = FILES[name]()
    library = tokenizers.Tokenizer.from_str(content)
    library.encode_special_tokens = True
    tokenizer = tk.make_json_tokenizer(content, "own")
    ids = [i for text in (TEXT, "</s>") for i in library.encode(text).ids]
    made = set(ids) & set(tokenizer.specials.values())
    assert made, "the library alone would not show the fault"

    check_no_special(tokenizer)
    assert [NOTE in note for note in tokenizer.notes] == [True]
    for text in (ENGLISH, "the cat sat, a dog"):
        assert tokenizer.encode(text).tolist() == library.encode(text).ids
    again = tk.tokenizer_from_json(tokenizer.to_json())
    assert (again.encode(TEXT) == tokenizer.encode(TEXT)).all()
    assert (again.specials, again.pieces) == (tokenizer.specials, tokenizer.pieces)


def test_no_text_becomes_end_of_text_that_is_a_user_defined_symbol(tmp_path):
    path = write_sentencepiece(tmp_path / "sp.model")
    tokenizer = tk.read_tokenizer(str(path))
    assert list(tokenizer.specials) == ["</s>"]
    check_no_special(tokenizer)
    assert NOTE in tokenizer.notes[0] and "</s>" in tokenizer.notes[0]

    import sentencepiece

    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.eot in library.encode(TEXT)
    assert tokenizer.encode("The lazy dog").tolist() == library.encode("The lazy dog")


def test_a_run_and_a_prepare_say_what_is_done_otherwise(tmp_path, capsys):
    (tmp_path / "own.json").write_text(make_added())
    (tmp_path / "a.txt").write_text(TEXT * 20)
    said = []
    data = config.Data(
        path=(str(tmp_path / "a.txt"),),
        cache=str(tmp_path / "cache"),
        tokenizer=str(tmp_path / "own.json"),
    )
    got = cache.prepare(data, tk.resolve_tokenizer(data.tokenizer), said.append)
    assert got.train.documents == 1
    assert [line for line in said if f"tokenizer own.json: its file {NOTE}" in line]

    source = write_jsonl(tmp_path / "a.jsonl", [TEXT, "two"])
    folder = prepare(tmp_path / "out", f"--input={source}", f"--tokenizer={data.tokenizer}")
    assert f"tokenizer own.json: its file {NOTE} <|endoftext|>" in capsys.readouterr().err
    assert prepared.documents(folder) == {"text": {"train": [TEXT, "two"], "eval": []}}


def test_end_of_text_is_the_name_that_the_file_calls_special():
    """Gemma has <eos>, and </s> as a tag of HTML. Chat tokens end turns and not texts."""
    spec = json.loads(train_library(["the cat"] * 9, ["<eos>", "<|im_end|>"]).to_str())
    flags = {**spec["added_tokens"][0], "special": False}
    size = len(spec["model"]["vocab"])
    spec["added_tokens"].append({**flags, "id": size, "content": "</s>"})
    read = tk.make_json_tokenizer(json.dumps(spec))
    assert (read.eot, read.specials) == (0, {"<eos>": 0, "<|im_end|>": 1})
    assert read.encode("</s>").tolist() == [size] and read.decode([size]) == "</s>"

    for token in spec["added_tokens"][:1]:
        token["special"] = False
    assert tk.make_json_tokenizer(json.dumps(spec)).eot == size


def test_a_special_token_that_cannot_be_hidden_is_refused():
    """It is one character, which byte-level text always spells."""
    spec = json.loads(make_added())
    flags = {**spec["added_tokens"][0], "special": True}
    spec["added_tokens"].append({**flags, "id": spec["model"]["vocab"]["q"], "content": "q"})
    with pytest.raises(UsageError, match=r"own: .*no token for 1 of the bytes"):
        tk.make_json_tokenizer(json.dumps(spec), "own")


def test_a_promise_that_is_broken_is_refused():
    tokenizer = tk.make_byte_tokenizer()
    with pytest.raises(UsageError, match="bytes: makes the special token a of plain text"):
        promises.check_promises(replace(tokenizer, specials={"a": 97}))
    lossy = replace(tokenizer, pieces=(*tokenizer.pieces[:97], b"b", *tokenizer.pieces[98:]))
    with pytest.raises(UsageError, match=r"gives .* back for .*use another tokenizer"):
        promises.check_promises(lossy)
    assert promises.check_promises(replace(lossy, lossless=False)).vocab == 257


# ---- fields ----


@pytest.fixture(scope="module")
def plain():
    """A tokenizer.json that says nothing unusual."""
    return json.loads(train_library([ENGLISH] * 9, ["<|endoftext|>"]).to_str())


def change(spec, place, value):
    """A copy of a file with another value at a place such as model.dropout."""
    *parts, last = place.split(".")
    changed = json.loads(json.dumps(spec))
    table = changed
    for part in parts:
        table = table[part]
    table[last] = value
    return json.dumps(changed)


STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
REFUSED = {
    "a field": ("lowercase", True, "own: lowercase = True: an unknown field"),
    "a field of the model": ("model.alpha", 0.1, r"model.alpha = 0.1: an unknown field"),
    "suffix": ("model.end_of_word_suffix", "</w>", "model.end_of_word_suffix = '</w>': would"),
    "prefix": ("model.continuing_subword_prefix", "##", "model.continuing_subword_prefix = '##'"),
    "model": ("model.type", "WordPiece", "model.type = 'WordPiece': drops text"),
    "normalizer": (
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "Shuffle"}]},
        "normalizer.type = 'Shuffle': not among the known steps",
    ),
    "a field of a normalizer": (
        "normalizer",
        {"type": "NFC", "strength": 2},
        "normalizer.NFC.strength = 2: an unknown field",
    ),
    "a field of a pre-tokenizer": (
        "pre_tokenizer.shift",
        1,
        "pre_tokenizer.ByteLevel.shift = 1: an unknown field",
    ),
    "pre-tokenizer": ("pre_tokenizer", {"type": "Whitespace"}, "only one of its pre_tokenizer"),
    "decoder": ("decoder", {"type": "CTC"}, "decoder.type = 'CTC': not among the known steps"),
    "decoder of another replacement": (
        "decoder",
        {"type": "Replace", "pattern": {"String": "_"}, "content": " "},
        r"decoder.Replace.pattern = \{'String': '_'\}: known is",
    ),
    "decoder that strips the end": (
        "decoder",
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {**STRIP, "stop": 1}]},
        "decoder.Strip.stop = 1: known is 0",
    ),
    "decoder that strips every token": ("decoder", STRIP, "unless Fuse comes before it"),
    "a field of an added token": ("added_tokens.0", None, "added_tokens.rank = 1: an unknown"),
    "no bytes for unknown characters": (
        "decoder",
        {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "only one of its pre_tokenizer and its decoder is ByteLevel",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_are_not_honoured_are_refused(plain, name):
    place, value, message = REFUSED[name]
    if place == "added_tokens.0":
        token = {**plain["added_tokens"][0], "rank": 1}
        content = json.dumps(plain | {"added_tokens": [token]})
    else:
        content = change(plain, place, value)
    with pytest.raises(UsageError, match=message) as refused:
        tk.make_json_tokenizer(content, "own")
    assert str(refused.value).startswith("tokenizer own: ")


def test_byte_fallback_must_be_on_where_bytes_are_spelt():
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)
    library = tokenizers.Tokenizer(model)
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    spec = json.loads(library.to_str())
    for fuse in (True, False):  # it has no effect while every character has bytes
        tokenizer = tk.make_json_tokenizer(change(spec, "model.fuse_unk", fuse))
        assert tokenizer.decode(tokenizer.encode("a 我们 a")) == "a 我们 a"
    with pytest.raises(UsageError, match=r"model.byte_fallback = false: characters"):
        tk.make_json_tokenizer(change(spec, "model.byte_fallback", False))


def test_added_tokens_of_spaces_count_as_spaces():
    """Gemma 3 adds ▁▁, which is also a token of its model."""
    pieces = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁▁", "a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = tokenizers.models.BPE(
        vocab, [("▁", "▁")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    library = tokenizers.Tokenizer(model)
    library.add_tokens([tokenizers.AddedToken("▁▁", normalized=False)])
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    decoders = tokenizers.decoders
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = tk.make_json_tokenizer(library.to_str())
    ids = tokenizer.encode("a  a")
    assert ids.tolist() == [pieces.index(piece) for piece in ("a", "▁▁", "a")]
    assert tokenizer.decode(ids) == library.decode(ids.tolist()) == "a  a"
    assert tokenizer.token_bytes[ids].tolist() == [1, 2, 1]


def test_what_is_for_a_finished_model_is_set_aside_and_said(plain):
    """Two encodings of a file with dropout are equal, and equal to those without it."""
    wanted = tk.make_json_tokenizer(json.dumps(plain))
    assert wanted.notes == ()
    template = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    for place, value in (
        ("model.dropout", 0.5),
        ("truncation", truncation),
        ("padding", padding),
        ("post_processor", template),
    ):
        read = tk.make_json_tokenizer(change(plain, place, value))
        for _ in range(3):
            assert read.encode(ENGLISH).tolist() == wanted.encode(ENGLISH).tolist()
        assert [place in note for note in read.notes] == [True]

    offsets = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    assert tk.make_json_tokenizer(change(plain, "post_processor", offsets)).notes == ()
    assert json_fields.list_notes(plain, ()) == ()


def test_added_tokens_that_take_spaces_are_not_lossless(plain):
    tool = {**plain["added_tokens"][0], "id": len(plain["model"]["vocab"]), "content": "<tool>"}
    tool |= {"special": False, "lstrip": True}
    spec = plain | {"added_tokens": [*plain["added_tokens"], tool]}
    assert not tk.make_json_tokenizer(json.dumps(spec)).lossless


# ---- ids ----


def test_ids_far_beyond_the_others_are_refused_at_once(plain):
    """The tables by id would take gigabytes."""
    longest = sorted(plain["model"]["vocab"], key=len)[-2]  # the last one is end of text
    for huge in (200_000_000, 4000):
        with pytest.raises(UsageError, match=rf"the id of .* = {huge}: the file has 3\d\d tokens"):
            tk.make_json_tokenizer(change(plain, f"model.vocab.{longest}", huge), "own")

    gap = tk.make_json_tokenizer(change(plain, f"model.vocab.{longest}", 900), "own")
    assert gap.vocab == 901


def test_two_tokens_of_one_id_are_refused(plain):
    first, second, *_ = sorted(plain["model"]["vocab"], key=len)[-2:]
    content = change(plain, f"model.vocab.{first}", plain["model"]["vocab"][second])
    with pytest.raises(UsageError, match="has the same id; give each token its own"):
        tk.make_json_tokenizer(content)


def test_an_added_token_that_gets_another_id_is_refused(plain):
    token = {**plain["added_tokens"][0], "content": "<tool>", "id": 700}
    with pytest.raises(UsageError, match=r"the id of '<tool>' = 700: the library gives it"):
        tk.make_json_tokenizer(json.dumps(plain | {"added_tokens": [token]}))


def test_saved_special_tokens_with_huge_ids_are_refused():
    saved = json.loads(tk.make_byte_tokenizer().to_json()) | {"extra": {"<|a|>": 300_000_000}}
    with pytest.raises(UsageError, match=r"'<\|a\|>': has the id 300000000"):
        tk.tokenizer_from_json(json.dumps(saved))
