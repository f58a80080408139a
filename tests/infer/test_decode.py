"""Generation: the cache equals full forward passes for every variant.

A row is the same in any batch, and stops cut to the letter.
"""

import math
import re
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import config
from gpt_jax.data.tokenizers.vocabulary import (
    StreamDecoder,
    Tokenizer,
    make_byte_tokenizer,
    make_char_tokenizer,
)
from gpt_jax.errors import UsageError
from gpt_jax.infer import decode
from gpt_jax.infer.decode import generate, stream_text
from gpt_jax.infer.prompts import digest_prompt
from gpt_jax.infer.ready import cast_multiplied
from gpt_jax.infer.sampling import Knobs, _filter as sampling_filter, sample
from gpt_jax.infer.settings import Sampling
from gpt_jax.infer.text import Completion, first_stop, held_back
from gpt_jax.model.transformer import Transformer, abstract_params
from gpt_jax.sharding.mesh import make_concrete

LETTERS = make_char_tokenizer("abcdefghijklmnopqrstuvwxyz012345")  # 32 ids, no end of text
PROMPTS = ["ab", "the5quick1brown2fox", "hello0w"]  # 2, 19 and 7 tokens
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)
BASE = dict(layers=2, embed=16, heads=4, mlp=32, vocab=40, max_seq=48)
COMPUTE = config.Compute(kernel="reference")
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


def make_model(**changes) -> config.Model:
    model = config.from_dict({**BASE, **changes}, config.Model)
    return config.resolve(config.Config(model=model)).model


@cache
def make_params(model: config.Model):
    """Parameters of noise, large enough that no most likely token is an accident of rounding.

    Projections that start at zero would hide the whole cache. Factors are near 1.
    """
    rng = np.random.default_rng(1)

    def one(path, leaf):
        factor = jax.tree_util.keystr(path, simple=True, separator="/").endswith(
            ("/scale", "residual/x")
        )
        return jnp.asarray(factor + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, abstract_params(model))


def silent(line: str) -> None:
    raise AssertionError(f"nothing to report, got {line!r}")


def run(
    model, prompts, sampling, tokenizer=LETTERS, report=silent, max_rows=32
) -> list[Completion]:
    return generate(
        model, COMPUTE, make_params(model), tokenizer, prompts, sampling, report, max_rows
    )


def knobs_of(rows, **values):
    made = (
        dict(
            seed=0,
            sample=0,
            prompt=0,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
        )
        | values
    )
    kinds = dict(seed=np.uint32, sample=np.int32, prompt=np.uint32, top_k=np.int32)

    return Knobs(
        **{
            k: np.broadcast_to(np.asarray(v, kinds.get(k, np.float32)), rows)
            for k, v in made.items()
        }
    )


@partial(jax.jit, static_argnums=0)
def forward(model, params, tokens):
    return Transformer(model).apply({"params": params}, {"tokens": tokens})


def full_logits(model, tokens):
    return forward(model, make_params(model), tokens)


# ---- the cache ----


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


# ---- batches ----

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


# ---- sampling ----


def numpy_filter(logits, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0, penalty=1.0, seen=()):
    """The probabilities of one row, by the definitions of transformers' logits processors.

    Those sort, unlike ours.
    """
    x = logits.astype(np.float64).copy()
    for token in seen:
        x[token] = x[token] * penalty if x[token] < 0 else x[token] / penalty
    x /= temperature
    if top_k:
        x[x < np.sort(x)[-min(top_k, len(x))]] = -np.inf

    def softmax(x):
        return np.exp(x - x.max()) / np.exp(x - x.max()).sum()

    if top_p < 1:
        order = np.argsort(
            x
        )  # ascending; all are dropped that together hold no more than 1 - top_p, but for the best
        drop = np.cumsum(softmax(x)[order]) <= 1 - top_p
        drop[-1] = False
        x[order[drop]] = -np.inf
    p = softmax(x)
    x[p < min_p * p.max()] = -np.inf
    return softmax(x)


FILTERS = [
    {},
    dict(top_k=5),
    dict(top_p=0.7),
    dict(min_p=0.2),
    dict(top_k=6, top_p=0.8, min_p=0.05),
    dict(temperature=0.5, top_p=0.9),
    dict(penalty=1.8, seen=(0, 3, 7)),
    dict(penalty=0.6, seen=(1, 2), top_k=4),
    dict(top_k=1),
    dict(top_p=0.0),
    dict(top_k=99),
    dict(min_p=1.0),
    dict(temperature=2.0, top_k=9, min_p=0.3),
]


@pytest.mark.parametrize("setting", FILTERS, ids=str)
def test_draws_follow_the_definition(setting):
    """Frequencies over 20,000 samples match the distribution, and no filtered token comes."""
    logits = np.random.default_rng(2).standard_normal(12).astype(np.float32) * 2
    rows, vocab = 20_000, 10  # ids 10 and 11 are padding
    expected = numpy_filter(logits[:vocab], **setting)
    penalty, seen_ids = setting.get("penalty", 1.0), setting.get("seen", ())
    values = {k: v for k, v in setting.items() if k not in ("penalty", "seen")}
    knobs = knobs_of(rows, sample=np.arange(rows), repetition_penalty=penalty, **values)
    seen = np.zeros((rows, 12), bool)
    seen[:, list(seen_ids)] = True
    logits = np.broadcast_to(np.where(np.arange(12) < vocab, logits, 50.0), (rows, 12)).astype(
        np.float32
    )
    drawn = np.asarray(
        jax.jit(sample, static_argnums=4)(logits, np.full(rows, 5), knobs, seen, vocab)
    )
    counts = np.bincount(drawn, minlength=12)

    assert counts[vocab:].sum() == 0
    assert ((counts[:vocab] > 0) == (expected > 1e-4)).all()
    np.testing.assert_allclose(counts[:vocab] / rows, expected, atol=4 * 0.5 / rows**0.5)


def test_filters_keep_the_same_ids_as_sorting():
    """They are the same ids over 64 rows of 300, each with settings of its own."""
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((64, 300)).astype(np.float32) * rng.uniform(
        0.3, 4, (64, 1)
    ).astype(np.float32)
    top_k = rng.choice([0, 1, 7, 40, 299, 500], 64)
    top_p = np.where(rng.random(64) < 0.2, 1, rng.uniform(0, 1, 64))
    scaled = logits - logits.max(-1, keepdims=True)
    kept = np.isfinite(sampling_filter(scaled, knobs_of(64, top_k=top_k, top_p=top_p)))
    for row, x, k, p in zip(kept, scaled, top_k, top_p, strict=True):
        assert (row == (numpy_filter(x, top_k=k, top_p=p) > 0)).all(), (k, p)


def test_rows_with_different_settings_and_greedy():
    logits = np.random.default_rng(3).standard_normal((4, 9)).astype(np.float32)
    seen = np.zeros((4, 9), bool)
    knobs = knobs_of(4, temperature=[0.0, 1.0, 0.0, 1.0], top_k=[0, 1, 3, 0], top_p=[1, 1, 1, 0.0])
    drawn = np.asarray(sample(logits, np.arange(4), knobs, seen, 9))
    assert drawn.tolist() == logits.argmax(-1).tolist()

    seen[0, drawn[0]] = True
    strong = sample(
        logits,
        np.arange(4),
        knobs._replace(repetition_penalty=np.full(4, 1e6, np.float32)),
        seen,
        9,
    )
    assert strong[0] != drawn[0] and (np.asarray(strong)[1:] == drawn[1:]).all()


def test_draws_change_with_seed_sample_prompt_and_position_only():
    logits = np.zeros((2, 1000), np.float32)

    def draw(position, **k):
        return np.asarray(
            sample(logits, np.full(2, position), knobs_of(2, **k), np.zeros((2, 1000), bool), 1000)
        ).tolist()

    a, b = draw(3, sample=[0, 1])
    assert a != b and draw(3, sample=[1, 0]) == [b, a]
    assert len({a, draw(4)[0], draw(3, seed=1)[0], draw(3, prompt=1)[0]}) == 4


def test_prompts_of_one_call_have_random_numbers_of_their_own():
    """An untrained model with no preference would continue all of them alike."""
    model = make_model()
    blank = jax.tree.map(jnp.zeros_like, make_params(model))
    given = Sampling(max_new_tokens=12, seed=3)
    done = generate(model, COMPUTE, blank, LETTERS, ["xx", "yy", "zz", "xx"], given, silent)
    texts = [completion.tokens for completion in done]
    assert len(set(texts)) == 3 and texts[0] == texts[3]


def test_extreme_temperatures_stay_finite():
    logits = np.array([[3.0, 1.0, -2.0, 2.9]], np.float32)
    for temperature in (1e-30, 1e-6):
        knobs = knobs_of(1, temperature=temperature, top_p=0.9)
        got = sample(logits, np.zeros(1, int), knobs, np.zeros((1, 4), bool), 4)
        assert got.tolist() == [0]


# ---- text ----


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


# ---- prompts ----


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
