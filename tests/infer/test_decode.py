"""Generation: the cache equals full forward passes for every variant.

A row is the same in any batch and on any mesh.
"""

import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generations import (
    COMPUTE,
    GREEDY,
    LETTERS,
    PROMPTS,
    knobs_of,
    make_model,
    make_params,
    run,
    silent,
)

from gpt_jax import config
from gpt_jax.data.tokenizers.vocabulary import make_byte_tokenizer
from gpt_jax.errors import UsageError
from gpt_jax.infer import decode
from gpt_jax.infer.decode import generate, stream_text
from gpt_jax.infer.prompts import digest_prompt
from gpt_jax.infer.ready import cast_multiplied
from gpt_jax.infer.sampling import sample
from gpt_jax.infer.settings import Sampling
from gpt_jax.model.transformer import Transformer, abstract_params
from gpt_jax.sharding.mesh import make_concrete

SWIGLU, RELU2 = (("attention", "swiglu"),), (("attention", "relu2"),)
VARIANTS = {
    "gpt2": {},
    "post_norm_relu_untied": dict(
        norm_position="post", pattern=(("attention", "relu"),), tied=False
    ),
    "llama": dict(
        norm="rmsnorm",
        position="rotary",
        pattern=SWIGLU,
        kv_heads=2,
        tied=False,
        bias=False,
        rope_scale_factor=8.0,
        rope_scale_original_seq=16,
    ),
    "multi_query_partial_rotary": dict(
        position="rotary", rope_fraction=0.5, kv_heads=1, pattern=(("attention", "gelu"),)
    ),
    "sinusoidal_geglu": dict(
        position="sinusoidal", pattern=(("attention", "geglu"),), embed_norm=True
    ),
    "no_positions_no_final_norm": dict(position="none", final_norm=False, qkv_bias=False),
    "qk_norm_before_rope": dict(position="rotary", qk_norm=True, qk_scale=1.2, norm="rmsnorm"),
    "qk_norm_after_rope": dict(
        position="rotary", qk_norm=True, qk_norm_after_rope=True, norm="plain_rmsnorm"
    ),
    "window_ring": dict(
        windows=(4,), position="rotary"
    ),  # wraps many times; a prompt of 19 fills it over and over
    "windows_by_layer": dict(
        layers=5, windows=(3, 0, 5), last_window_full=True, position="learned"
    ),  # has a tail
    "softcaps": dict(attention_softcap=2.0, logit_softcap=5.0, windows=(6, 0), kv_heads=2),
    "modern": dict(
        layers=5,
        norm="plain_rmsnorm",
        position="rotary",
        qk_norm=True,
        qk_norm_after_rope=True,
        qk_scale=1.2,
        pattern=RELU2,
        tied=False,
        bias=False,
        value_embed=True,
        value_embed_gate=8,
        residual_scalars=True,
        smear=True,
        smear_gate=5,
        backout=True,
        logit_softcap=15.0,
        windows=(4, 4, 0),
        last_window_full=True,
        embed_norm=True,
        init="modern",
    ),
    "mixed_pattern_unrolled": dict(
        layers=4, pattern=(("attention", "relu"), ("attention", "swiglu"))
    ),
}


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return Transformer(model).apply({"params": params}, {"tokens": tokens})


def full_logits(model, tokens):
    return forward(model, make_params(model), tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_equals_uncached(name):
    """Each token, greedy or drawn, is the one that a full forward pass of all before it gives."""
    model = make_model(**VARIANTS[name])
    for sampling in (GREEDY, replace(GREEDY, temperature=1.0)):
        done = run(model, PROMPTS, sampling)
        tokens = np.zeros((3, model.max_seq), np.int32)
        for row, prompt, completion in zip(tokens, PROMPTS, done, strict=True):
            ids = [*LETTERS.encode(prompt), *completion.tokens]
            row[: len(ids)] = ids
        logits = np.asarray(full_logits(model, tokens))
        for b, (prompt, completion) in enumerate(zip(PROMPTS, done, strict=True)):
            position = len(prompt) + np.arange(24)
            digest = digest_prompt(LETTERS.encode(prompt))
            knobs = knobs_of(24, temperature=sampling.temperature, prompt=digest)
            seen = np.zeros((24, model.vocab), bool)
            expected = sample(logits[b, position - 1], position, knobs, seen, LETTERS.vocab)
            assert completion.tokens == tuple(expected.tolist())
            assert completion.finish == "length"

    assert len({token for completion in done for token in completion.tokens}) > 5


def test_the_whole_context_can_be_filled():
    for position in ("learned", "rotary"):
        model, lines = make_model(position=position, max_seq=20, windows=(0, 3)), []
        [done] = run(model, ["hello0w"], replace(GREEDY, max_new_tokens=50), report=lines.append)
        assert done.finish == "length" and len(done.tokens) == 13
        assert lines == ["prompt 1: stops after 13 new tokens, where the context of 20 is full"]
        ids = np.array([*LETTERS.encode("hello0w"), *done.tokens])[None]
        best = np.asarray(full_logits(model, ids))[0, 6:-1, : LETTERS.vocab].argmax(-1)
        assert best.tolist() == list(done.tokens)


def test_kernels_cast_once_change_nothing():
    model = make_model(tied=False)
    params, tokens = make_params(model), np.arange(12)[None]
    cast = cast_multiplied(params, "bfloat16")
    assert (
        cast["head"]["kernel"].dtype == jnp.bfloat16 and cast["embed"]["table"].dtype == jnp.float32
    )
    compute = config.Compute(kernel="reference", dtype="bfloat16")

    def logits(params):
        return Transformer(model, compute).apply({"params": params}, {"tokens": tokens})

    assert (logits(cast) == logits(params)).all()


DRAWN = Sampling(
    max_new_tokens=12, temperature=0.9, top_k=12, top_p=0.95, repetition_penalty=1.2, seed=3
)


def test_a_row_does_not_depend_on_its_batch():
    model = make_model(position="rotary", windows=(5, 0))
    sampling = replace(DRAWN, num_samples=2)
    together = run(model, PROMPTS, sampling)
    alone = [
        done._replace(prompt=p)
        for p, prompt in enumerate(PROMPTS)
        for done in run(model, [prompt], sampling)
    ]
    assert together == alone == run(model, PROMPTS, sampling, max_rows=2)
    assert [c[:2] for c in together] == [(p, s) for p in range(3) for s in range(2)]
    assert together[0].tokens != together[1].tokens
    assert together != run(model, PROMPTS, replace(sampling, seed=4))

    first = run(model, PROMPTS + PROMPTS, DRAWN)
    assert (
        first[:3]
        == [c for c in together if c.sample == 0]
        == [c._replace(prompt=c.prompt - 3) for c in first[3:]]
    )


def test_a_capacity_in_training_changes_no_text():
    """With it, a row would depend on its bucket, and one token on its cache."""
    experts = dict(pattern=(("attention", "moe"),), experts=4, expert_mlp=16, capacity_factor=0.25)
    model = make_model(position="rotary", dispatch="capacity", **experts)
    said = []
    texts = run(model, PROMPTS, GREEDY, report=said.append)
    assert texts == run(replace(model, dispatch="dropless"), PROMPTS, GREEDY)
    assert len(said) == 1 and "config.model.dispatch = 'capacity'" in said[0]
    alone = [run(model, [prompt], GREEDY, report=said.append)[0] for prompt in PROMPTS]
    assert [done.tokens for done in alone] == [done.tokens for done in texts]


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1)])
def test_a_mesh_changes_nothing(mesh, shape):
    model = make_model(
        position="rotary",
        kv_heads=2,
        tied=False,
        windows=(5, 0),
        value_embed=True,
        value_embed_gate=8,
    )
    plain = run(model, PROMPTS, DRAWN)
    params = make_params(model)
    devices = mesh(*shape)

    with jax.set_mesh(devices):
        layout = make_concrete(abstract_params(model), devices)
        placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, layout)
        before = decode._next._cache_size()
        assert generate(model, COMPUTE, placed, LETTERS, PROMPTS, DRAWN, silent) == plain
        assert (
            decode._next._cache_size() == before + 1
        )  # the state keeps its layout from step to step


@pytest.mark.parametrize("shape, gathers", [((1, 1, 4), False), ((1, 4, 1), True)])
def test_tensor_leaves_weights_where_they_are(mesh, monkeypatch, shape, gathers):
    """A token moves its activations alone. Along fsdp every token would gather all weights."""
    model = make_model(position="rotary", kv_heads=4, tied=False, embed=64, mlp=128)
    texts = []
    plain = decode._next

    def compile_too(*args, **static):
        texts.append(plain.lower(*args, **static).compile().as_text())
        return plain(*args, **static)

    monkeypatch.setattr(decode, "_next", compile_too)
    devices = mesh(*shape)
    with jax.set_mesh(devices):
        like = make_concrete(abstract_params(model), devices)
        placed = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), make_params(model), like)
        sampling = replace(GREEDY, max_new_tokens=2)
        generate(model, COMPUTE, placed, LETTERS, PROMPTS[:1], sampling, silent)

    (text,) = texts
    results = re.findall(r"= (.*) all-gather(?:-start)?\(", text)  # one array, or a tuple of them
    shapes = [shape for result in results for shape in re.findall(r"\[([\d,]+)\]", result)]
    largest = max((math.prod(map(int, shape.split(","))) for shape in shapes), default=0)
    smallest_weight = model.embed * model.embed // 4  # of one device
    assert (largest >= smallest_weight) == gathers


def test_one_compilation_for_a_bucket(monkeypatch):
    model, traced, pick = make_model(mlp=24), [], decode._pick
    monkeypatch.setattr(decode, "_pick", lambda *args: traced.append(args[1].shape) or pick(*args))

    def texts(*sizes):
        return ["a" * n for n in sizes]

    run(model, texts(3, 16), GREEDY)
    assert len(traced) == 2  # a prompt and a step
    run(
        model, texts(9, 2), replace(DRAWN, max_new_tokens=24, min_p=0.1)
    )  # other values, the same bucket
    run(model, texts(1, 12), replace(DRAWN, max_new_tokens=21, temperature=0.0))
    assert len(traced) == 2
    run(model, texts(17, 5), replace(GREEDY, max_new_tokens=16))  # a longer prompt, the same total
    assert len(traced) == 3
    run(model, texts(1, 2, 3), GREEDY)  # four rows
    assert len(traced) == 5


def test_a_prompt_that_fills_the_context():
    model, lines = make_model(max_seq=24), []
    prompt = "abcdefghij0123" * 2
    with pytest.raises(
        UsageError, match=r"prompt 2 has 28 tokens.*holds 24.*shorten it to 23.*--truncate"
    ):
        run(model, ["ab", prompt], GREEDY, report=lines.append)

    for new, keep in ((4, 20), (100, 12)):
        lines.clear()
        sampling = replace(GREEDY, max_new_tokens=new, truncate=True)
        cut = run(model, [prompt], sampling, report=lines.append)
        assert lines[0] == (
            f"prompt 1: kept the last {keep} of 28 tokens, cut the first {28 - keep} "
            "(the context holds 24, new ones included)"
        )
        assert cut == run(
            model, [prompt[-keep:]], replace(sampling, truncate=False), report=lines.append
        )


def test_an_empty_prompt_starts_from_end_of_text():
    model = make_model(vocab=264)
    with pytest.raises(
        UsageError, match=r"prompt 1 is empty.*char tokenizer has no end-of-text.*give a prompt"
    ):
        run(model, [""], GREEDY)
    [done] = run(model, [""], replace(GREEDY, max_new_tokens=1), make_byte_tokenizer())
    best = np.asarray(full_logits(model, np.array([[256]])))[0, 0, :257].argmax()
    assert best != 256 and done.tokens == (best,)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(temperature=-1.0), "--temperature = -1.0: expected at least 0"),
        (dict(temperature=float("nan")), "--temperature = nan"),
        (dict(top_p=1.5), "--top_p = 1.5: expected from 0.0 to 1.0"),
        (dict(top_k=-2), "--top_k = -2"),
        (dict(max_new_tokens=0), "--max_new_tokens = 0"),
        (dict(num_samples=0), "--num_samples = 0"),
        (dict(repetition_penalty=0.0), "--repetition_penalty = 0.0"),
        (dict(stop=("",)), "--stop = ''"),
    ],
)
def test_values_out_of_range(change, words):
    with pytest.raises(UsageError, match=words.replace("(", r"\(")):
        stream_text(
            make_model(), COMPUTE, {}, LETTERS, ["a"], Sampling(**change), silent
        )  # before the first piece is asked for
