"""Continuations as tasks of lm-evaluation-harness ask for them, without that package."""

import pytest
import subjects

from gpt_jax.errors import UsageError
from gpt_jax.evals import until
from gpt_jax.evals.until import generate_until, read_sampling

TABLE = subjects.make_chain("abcdefghij", subjects.draw_table())


def refuse(line):
    raise AssertionError(line)


def test_settings_of_a_task():
    said = []
    found = read_sampling({"until": ["\n", "", "Q:"], "max_gen_toks": 8}, 64, refuse)
    assert (found.stop, found.max_new_tokens, found.temperature) == (("\n", "Q:"), 8, 0.0)
    assert read_sampling({"until": "x"}, 64, refuse).stop == ("x",)
    assert read_sampling({}, 64, refuse).max_new_tokens == 32
    assert read_sampling({}, 4096, refuse).max_new_tokens == 256
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert read_sampling({name: 5}, 64, refuse).max_new_tokens == 5
    both = {"max_tokens": 5, "max_gen_toks": 6}
    assert read_sampling(both, 64, refuse).max_new_tokens == 6

    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 3, "top_p": 0.5}
    found = read_sampling(drawn, 64, refuse)
    assert (found.temperature, found.top_k, found.top_p) == (0.7, 3, 0.5)
    assert read_sampling({"temperature": 0.7}, 64, refuse).temperature == 0.7
    assert read_sampling(drawn | {"do_sample": False}, 64, refuse).temperature == 0.0
    read_sampling({"num_beams": 4}, 64, said.append)
    assert said == ["generation setting num_beams = 4: is unknown here and left out"]
    for limit in (0, 64):
        with pytest.raises(UsageError, match=f"max_gen_toks = {limit}: expected 1 to 63"):
            read_sampling({"max_gen_toks": limit}, 64, refuse)


def test_texts_end_before_their_stop_string(monkeypatch):
    """Answers come in the order of the prompts, and those of like settings are drawn together."""
    calls = []
    plain = until.generate

    def count(*given):
        calls.append(len(given[4]))
        return plain(*given)

    monkeypatch.setattr(until, "generate", count)
    subject = subjects.make_subject(TABLE)
    stop = {"until": ["gh"], "max_gen_toks": 8}
    short = {"until": "zz", "max_gen_toks": 2}
    asked = [("a", stop), ("xxa", short), ("xxxxb", stop), ("", short), ("c", stop)]
    found = generate_until(subject, asked, refuse)
    assert found == ["bcdef", "bc", "cdef", "ab", "def"]
    assert calls == [3, 2]


def test_a_prompt_keeps_its_last_tokens(monkeypatch):
    prompts = []
    plain = until.generate

    def look(*given):
        prompts.extend(given[4])
        return plain(*given)

    monkeypatch.setattr(until, "generate", look)
    said = []
    settings = {"until": ["\n"], "max_gen_toks": 4}
    long = "0123456789" * 6 + "a"  # 61 tokens; the context of 64 has room for 60
    found = generate_until(subjects.make_subject(TABLE), [(long, settings)], said.append)
    assert found == ["bcde"]
    assert bytes(prompts[0].tolist()).decode() == long[1:]
    assert len(said) == 1 and "1 of 1 prompts do not fit the context of 64 tokens" in said[0]
