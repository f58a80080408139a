"""Texts that a model writes during training."""

from gpt_jax import config
from gpt_jax.errors import UsageError
from gpt_jax.infer import Sampling, generate


def choose_prompts(model: config.Model, tokenizer, knobs: config.Eval) -> tuple[str, ...]:
    """Returns the prompts of a run's samples. Without any, a run starts from a line break.

    Raises UsageError if this tokenizer and context cannot take a prompt. A run calls this before
    training, so that the error does not come after hours.
    """
    for i, prompt in enumerate(knobs.sample_prompts):
        name = f"config.eval.sample_prompts[{i}] = {prompt!r}"
        _check_prompt(name, prompt, tokenizer, model.max_seq)
    if knobs.sample_prompts:
        return knobs.sample_prompts

    # A vocabulary of characters may have no line break.
    try:
        tokenizer.encode("\n")
    except UsageError:
        return (tokenizer.decode([0]),)
    return ("\n",)


def _check_prompt(name: str, prompt: str, tokenizer, context: int) -> None:
    try:
        size = len(tokenizer.encode(prompt))
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None

    if not size and tokenizer.eot is None:
        raise UsageError(
            f"{name}: has no tokens, and the {tokenizer.name} tokenizer has no end-of-text token "
            "to start from; give at least one character"
        )
    if size >= context:
        raise UsageError(
            f"{name}: has {size} tokens and the context of {context} has no room for more; "
            "shorten it"
        )


def draw_samples(
    model: config.Model,
    compute: config.Compute,
    params,
    tokenizer,
    knobs: config.Eval,
    seed: int,
    count: int,
) -> list[str]:
    """Draws `count` texts, prompts in turn, each with its prompt in front.

    No text is longer than the context. All processes of a job must call this together.
    """
    prompts = knobs.sample_prompts[:count]
    samples_each = -(-count // len(prompts))
    sampling = Sampling(
        max_new_tokens=knobs.sample_tokens,
        temperature=knobs.sample_temperature,
        top_k=knobs.sample_top_k,
        seed=seed,
        num_samples=samples_each,
    )
    done = generate(model, compute, params, tokenizer, prompts, sampling, lambda line: None)

    texts = []
    for i in range(count):
        turn, prompt = divmod(i, len(prompts))
        texts.append(prompts[prompt] + done[prompt * samples_each + turn].text)
    return texts
