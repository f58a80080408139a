"""What is measured on held-out text, and samples (floor 3; called by loop and the evaluate
command)."""

import lzma
from collections.abc import Callable, Iterable, Mapping

import jax

from gpt_jax import config, placing
from gpt_jax.data.dataset import Dataset
from gpt_jax.errors import UsageError
from gpt_jax.infer.decode import Sampling, generate
from gpt_jax.metrics import Sums, add, divide, perplexity


def heldout_sums(step: Callable, params, batches: Iterable, mesh, batch_size: int) -> Sums:
    """Sums of `step(params, batch)` over all `batches` (this process's rows of each); fetched
    once, at the end."""
    total: Sums = {}
    for columns in batches:
        total = add(total, step(params, placing.to_devices(mesh, columns, batch_size)))
    return jax.device_get(total)


def heldout_metrics(sums: Sums) -> dict[str, float]:
    """loss (nats a token), perplexity, bits_per_byte and accuracy."""
    means = divide(sums)
    return {
        "loss": means["loss"],
        "perplexity": perplexity(*sums["loss"]),
        "bits_per_byte": means["bits_per_byte"],
        "accuracy": means["accuracy"],
    }


def by_source(
    found: Mapping[str, Mapping[str, float]], shares: Mapping[str, float]
) -> dict[str, float]:
    """`eval/<metric>` of {source: metrics}: of the only source, or the mean weighted by the
    sources' `shares` of the rows trained on (perplexity: of the mean loss), and then
    `eval/<source>/<metric>` besides."""
    total = sum(shares[name] for name in found)
    weight = {name: shares[name] / total if total else 1 / len(found) for name in found}
    mean = {
        metric: sum(weight[name] * found[name][metric] for name in found)
        for metric in next(iter(found.values()))
    }
    mean["perplexity"] = perplexity(mean["loss"], 1)
    own = {
        f"eval/{name}/{metric}": value
        for name, row in found.items()
        for metric, value in row.items()
    }
    return {f"eval/{metric}": value for metric, value in mean.items()} | (
        own if len(found) > 1 else {}
    )


def heldout_text(data: Dataset) -> bytes:
    """The held-out text of all sources, as the tokenizer gives it back."""
    return b"".join(
        data.tokenizer.decode_bytes(tokens.ids(0, tokens.size)) for tokens in data.heldout.values()
    )


def xz_bits_per_byte(data: Dataset) -> float:
    """What `xz -9` needs for the held-out text: a yardstick that anyone can check, in the
    model's own unit."""
    text = heldout_text(data)
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def sample_prompts(model: config.Model, tokenizer, knobs: config.Eval) -> tuple[str, ...]:
    """The prompts of a run's samples. Raises UsageError, before training and not after it, for
    one that this tokenizer and context cannot take."""
    for i, prompt in enumerate(knobs.sample_prompts):
        try:
            size = len(tokenizer.encode(prompt))
        except UsageError as error:
            raise UsageError(f"config.eval.sample_prompts[{i}] = {prompt!r}: {error}") from None
        if not size and tokenizer.eot is None:
            raise UsageError(
                f"config.eval.sample_prompts[{i}] = {prompt!r}: has no tokens, and the {tokenizer.name} "
                "tokenizer has no end-of-text token to start from; give at least one character"
            )
        if size >= model.max_seq:
            raise UsageError(
                f"config.eval.sample_prompts[{i}] = {prompt!r}: has {size} tokens and the context of "
                f"{model.max_seq} has no room for more; shorten it"
            )
    if knobs.sample_prompts:
        return knobs.sample_prompts
    try:
        tokenizer.encode("\n")
        return ("\n",)
    except UsageError:
        return (tokenizer.decode([0]),)


def samples(
    model: config.Model, params, tokenizer, knobs: config.Eval, seed: int, count: int
) -> list[str]:
    """`count` texts, prompts in turn, each with its prompt in front; none longer than the
    context. Every process of a job calls it together."""
    prompts = knobs.sample_prompts[:count]
    each = -(-count // len(prompts))
    sampling = Sampling(
        max_new_tokens=knobs.sample_tokens,
        temperature=knobs.sample_temperature,
        top_k=knobs.sample_top_k,
        seed=seed,
        num_samples=each,
    )
    done = generate(model, params, tokenizer, prompts, sampling, lambda line: None)
    rows = [(i % len(prompts)) * each + i // len(prompts) for i in range(count)]
    return [prompts[done[row].prompt] + done[row].text for row in rows]
