"""Ask a checkpoint which of several texts is likeliest, and where a text surprises it.

    python examples/choose.py --checkpoint=runs/quickstart --context='The run ' is ran banana

Scores are log-probabilities in nats. Longer texts are less likely, so they are also shown a byte.
"""

import argparse

import numpy as np

import gpt_jax


def choose(checkpoint: str, context: str, choices: list[str]) -> list[tuple[float, float, str]]:
    """(log-probability, the same a byte, choice), the likeliest first."""
    loaded = gpt_jax.load(checkpoint, devices=1)
    scores = loaded.score(context, choices)
    rows = [
        (score, score / len(choice.encode()), choice)
        for score, choice in zip(scores, choices, strict=True)
    ]
    return sorted(rows, reverse=True)


def find_surprise(checkpoint: str, text: str) -> list[tuple[float, str]]:
    """(log-probability, token) of each token of a text but its first."""
    loaded = gpt_jax.load(checkpoint, devices=1)
    ids = loaded.tokenizer.encode(text)
    logits = loaded.logits(ids)[:-1].astype(np.float64)  # after each token but the last
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    taken = logprobs[np.arange(len(ids) - 1), ids[1:]]
    return [(float(p), loaded.tokenizer.decode([i])) for p, i in zip(taken, ids[1:], strict=True)]


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description="Scores of several continuations.")
    flags.add_argument("--checkpoint", required=True)
    flags.add_argument("--context", default="")
    flags.add_argument("choices", nargs="+")
    args = flags.parse_args()
    for score, per_byte, choice in choose(args.checkpoint, args.context, args.choices):
        print(f"{score:9.3f} nats  {per_byte:7.3f} a byte  {choice!r}")
    for score, token in find_surprise(args.checkpoint, args.context + args.choices[0]):
        print(f"{score:9.3f}  {token!r}")
