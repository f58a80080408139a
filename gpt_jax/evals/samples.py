"""Texts that a model writes during training."""

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.infer import Sampling, generate


def choose_prompts(model: config.Model, tokenizer, knobs: config.Eval) -> tuple[str, ...]:
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


def draw_samples(
    model: config.Model,
    compute: config.Compute,
    params,
    tokenizer,
    knobs: config.Eval,
    seed: int,
    count: int,
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
    done = generate(model, compute, params, tokenizer, prompts, sampling, lambda line: None)
    rows = [(i % len(prompts)) * each + i // len(prompts) for i in range(count)]
    return [prompts[done[row].prompt] + done[row].text for row in rows]
