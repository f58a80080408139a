"""How tokens are drawn and when a row ends. The command line reads this without importing JAX."""

import dataclasses
import math
from dataclasses import dataclass

from gpt_jax.config import knob
from gpt_jax.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when a row ends.

    Filters apply in the order of Hugging Face's: repetition penalty, temperature, top_k, top_p (of
    what top_k left), min_p. Raises UsageError if a value is out of its range.
    """

    max_new_tokens: int = knob(100, "The most new tokens of a row.", low=1)
    temperature: float = knob(1.0, "The logits are divided by this. 0 is greedy.", low=0.0)
    top_k: int = knob(
        0, "Only so many most likely tokens are drawn from. 0 is off.", low=0, high=2**31 - 1
    )
    top_p: float = knob(
        1.0,
        "The fewest tokens that hold this probability are drawn from (Holtzman et al. 2020).",
        low=0.0,
        high=1.0,
    )
    min_p: float = knob(
        0.0,
        "A token needs at least this part of the best token's probability.",
        low=0.0,
        high=1.0,
    )
    repetition_penalty: float = knob(
        1.0, "Above 1, tokens that the row has already become less likely (CTRL, 2019).", low=1e-3
    )
    seed: int = knob(0, "The seed of the drawing.", low=0, high=2**32 - 1)
    num_samples: int = knob(1, "Rows for each prompt.", low=1)
    stop: tuple[str, ...] = knob((), "A row ends before the first of these strings.")
    truncate: bool = knob(
        False, "A prompt that fills the context keeps its last tokens, where it would raise."
    )

    def __post_init__(self):
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            low = spec.metadata.get("low")
            high = spec.metadata.get("high")
            # The value is named as the flag of the generate command.
            if low is not None and not low <= value <= (math.inf if high is None else high):
                bounds = f"at least {low}" if high is None else f"from {low} to {high}"
                raise UsageError(f"--{spec.name} = {value!r}: expected {bounds}")
        if "" in self.stop:
            raise UsageError("--stop = '': an empty string would stop at once; leave it out")
