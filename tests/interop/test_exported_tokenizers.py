"""The tokenizer.json beside exported weights, as the library reads it."""

import base64
import json
from dataclasses import replace

import pytest
import tokenizers
from drawn_models import LLAMA, make_origin
from framed_tokenizers import save_tokenizer

from gpt_jax.data import resolve_tokenizer
from gpt_jax.data.tokenizers.bpe import export_json
from gpt_jax.data.tokenizers.vocabulary import with_specials
from gpt_jax.errors import UsageError
from gpt_jax.interop import describe_left_out, find_tokenizer, write_directory


def export(tokenizer, folder):
    """The library's tokenizer of an exported model."""
    fields = LLAMA | {"vocab": tokenizer.vocab}
    write_directory(make_origin(fields)._replace(tokenizer=tokenizer), folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("ending", ["+chat", "+fim+chat"])
def test_added_special_tokens_have_their_ids(tmp_path, ending):
    ours = resolve_tokenizer(save_tokenizer(tmp_path, "") + ending)
    library = export(ours, tmp_path / "hf")
    assert {name: library.token_to_id(name) for name in ours.specials} == dict(ours.specials)
    assert library.get_vocab_size() == ours.vocab

    text = "<|im_start|>user\nä b<|im_end|>"
    turn = ours.encode("user\nä b").tolist()
    ids = [ours.specials["<|im_start|>"], *turn, ours.specials["<|im_end|>"]]
    assert library.encode(text, add_special_tokens=False).ids == ids
    assert library.decode(ids, skip_special_tokens=True) == "user\nä b"

    again = find_tokenizer(tmp_path / "hf")
    assert again.specials == ours.specials and again.pieces == ours.pieces
    assert again.encode(text).tolist() == ours.encode(text).tolist()


def test_a_file_without_added_tokens_stays_as_it_is(tmp_path):
    path = save_tokenizer(tmp_path, "<s> $A")
    export(resolve_tokenizer(path), tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.json").read_text() == (tmp_path / "tokenizer.json").read_text()


def test_ids_that_the_library_would_move_are_refused(tmp_path):
    """The library counts tokens for the next id, and here ids before the last one have none."""
    path = save_tokenizer(tmp_path, "")
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"]["ab"] = 310
    for i, token in enumerate(values["added_tokens"], 257):
        token["id"] = i
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(UsageError, match=r"id of .*im_start.* = 311: the library gives it 259"):
        export_json(resolve_tokenizer(path + "+chat"))


def test_what_a_model_file_cannot_hold_is_told():
    origin = make_origin()
    plain = replace(origin.tokenizer, kind="sentencepiece", content=base64.b64encode(b"x").decode())
    assert describe_left_out(origin._replace(tokenizer=plain)) == ""
    line = describe_left_out(origin._replace(tokenizer=with_specials(plain, ["<a>"])))
    assert line.endswith("<a> = 257")
    assert "has no file there" in describe_left_out(origin)
