"""Texts that end at a stop string, by the settings of lm-evaluation-harness's tasks."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt_jax.errors import UsageError
from gpt_jax.evals.subject import Subject
from gpt_jax.infer import Sampling, generate

# The names that tasks have for the most new tokens. The first of them counts.
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# The most new tokens where a task says nothing, as Hugging Face's models have it there.
NEW_TOKENS = 256
# Settings that mean the same in `Sampling`.
SHARED = ("top_k", "top_p", "min_p", "repetition_penalty")

Report = Callable[[str], None]


def count_default_tokens(context: int) -> int:
    """The most new tokens where a task says nothing. A prompt keeps half a short context."""
    return min(NEW_TOKENS, context // 2)


def read_sampling(settings: Mapping[str, Any], context: int, report: Report) -> Sampling:
    """The Sampling of a task's generation settings.

    Without `do_sample` a temperature above 0 draws, and with `do_sample` false the most likely
    token is taken. `report` gets a line for each setting that is left out. Raises UsageError if
    the new tokens leave no room for a prompt, or if a value is out of its range.
    """
    rest = dict(settings)
    stops = rest.pop("until", None) or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    limits = [value for name in LIMITS if (value := rest.pop(name, None)) is not None]
    limit = int(limits[0]) if limits else count_default_tokens(context)
    if not 0 < limit < context:
        raise UsageError(
            f"max_gen_toks = {limit}: expected 1 to {context - 1}, because the model's context "
            f"holds {context} tokens, prompt included; change it in the task"
        )

    temperature = float(rest.pop("temperature", 0.0) or 0.0)
    if rest.pop("do_sample", None) is False:
        temperature = 0.0
    shared = {name: rest.pop(name) for name in SHARED if rest.get(name) is not None}
    for name, value in rest.items():
        report(f"generation setting {name} = {value!r}: is unknown here and left out")
    return Sampling(
        max_new_tokens=limit,
        temperature=temperature,
        stop=tuple(stop for stop in stops if stop),
        **shared,
    )


def generate_until(
    subject: Subject, asked: Sequence[tuple[str, Mapping[str, Any]]], report: Report
) -> list[str]:
    """The continuation of each (prompt, settings), up to its first stop string and without it.

    A prompt keeps its last tokens, so that all new ones fit the context. `report` tells how many
    were cut. Prompts of the same settings are continued together. Raises UsageError as
    `read_sampling` does.
    """
    context = subject.model.max_seq
    prompts = subject.tokenizer.encode_batch([prompt for prompt, _ in asked])
    groups: dict[str, list[int]] = {}
    for number, (_, settings) in enumerate(asked):
        key = json.dumps(settings, sort_keys=True, default=str)
        groups.setdefault(key, []).append(number)

    texts: dict[int, str] = {}
    cut = 0
    for numbers in groups.values():
        sampling = read_sampling(asked[numbers[0]][1], context, report)
        room = context - sampling.max_new_tokens
        cut += sum(len(prompts[number]) > room for number in numbers)
        # Neighbours of like length share a batch, whose rows have the length of its longest.
        numbers.sort(key=lambda number: -len(prompts[number]))
        kept = [prompts[number][-room:] for number in numbers]
        done = generate(*subject, kept, sampling, report)
        texts |= {number: one.text for number, one in zip(numbers, done, strict=True)}

    if cut:
        report(
            f"{cut} of {len(asked)} prompts do not fit the context of {context} tokens, new ones "
            "included; their first tokens were left out"
        )
    return [texts[number] for number in range(len(asked))]
