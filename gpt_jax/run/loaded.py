"""A trained model on its devices, and what it can be asked from Python."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from gpt_jax import config as configs
from gpt_jax.data import Classify, TaskNote, Tokenizer, make_prompt, read_options
from gpt_jax.errors import UsageError
from gpt_jax.infer import (
    Classified,
    Request,
    Sampling,
    classify_prompts,
    compute_logits,
    encode_pairs,
    encode_text,
    generate,
    score_requests,
    start_request,
    start_token,
)

Say = Callable[[str], None]


def tell(line: str) -> None:
    """Prints a message on standard error."""
    print(line, file=sys.stderr)


class Loaded(NamedTuple):
    """A trained model. Its attention kernel was chosen for this machine. `params` lie on `mesh`."""

    config: configs.Config
    tokenizer: Tokenizer
    params: Any
    mesh: jax.sharding.Mesh
    directory: Path
    step: int
    content: str  # digest of the text that it was trained on
    examples: int  # training rows that the updates behind it have read
    tasks: tuple[TaskNote, ...] = ()  # of the text that it was trained on

    def logits(self, text: str | Sequence[int] | np.ndarray, say: Say = tell) -> np.ndarray:
        """The logits after each token of a text, or of its ids: float32 [T, V].

        V counts the rows of the embedding, which may be more than the tokenizer's ids. An empty
        text stands for the end-of-text token. Raises UsageError if the text does not fit the
        context, or if an id is no row of the embedding.
        """
        if isinstance(text, str):
            ids = encode_text(self.tokenizer, text)
            if not len(ids):
                ids = np.array([start_token(self.tokenizer)])
        else:
            ids = np.asarray(text, np.int64)
            if ids.ndim != 1:
                raise UsageError(f"ids: have the shape {ids.shape}; give those of one text")
        model, compute = self.config.model, self.config.compute
        with jax.set_mesh(self.mesh):
            return compute_logits(model, compute, self.params, ids, say)

    def score(self, context: Any, continuation: Any, say: Say = tell) -> Any:
        """The log-probability of a continuation after its context, in nats: a float.

        Each is a text, or both are ids. A list of several gives a list of floats: one context may
        have several continuations, or each continuation has its own context. White space at the
        end of a context counts to the continuation. An empty context, of a text or of ids, stands
        for the start token, which of most tokenizers is end of text. A context that does not fit
        loses its first tokens, and `say` tells it.

        Raises UsageError if the lists differ in length, or if a continuation cannot be scored.
        """
        has_one_context = is_one(context) or is_empty_before_ids(context, continuation)
        contexts = [context] if has_one_context else list(context)
        continuations = [continuation] if is_one(continuation) else list(continuation)
        if has_one_context:
            contexts = contexts * len(continuations)
        if len(contexts) != len(continuations):
            raise UsageError(
                f"score: {len(contexts)} contexts and {len(continuations)} continuations; give "
                "one context, or as many as continuations"
            )

        requests = make_requests(self.tokenizer, zip(contexts, continuations, strict=True))
        model, compute = self.config.model, self.config.compute
        with jax.set_mesh(self.mesh):
            scores = score_requests(model, compute, self.params, requests, say)
        totals = [score.total for score in scores]
        return totals[0] if is_one(continuation) and has_one_context else totals

    def generate(self, prompts: str | Sequence[str], say: Say = tell, **sampling: Any) -> list[str]:
        """Continuations of `prompts`, `num_samples` for each, in the order of the prompts.

        A text alone is one prompt. `sampling` are the fields of infer.Sampling, such as
        temperature, top_p and seed. Raises UsageError if one of them is unknown, of another type
        or out of range, or if a prompt does not fit.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise UsageError(f"prompts: {prompt!r} is no text; give a text or a list of texts")
        settings = cast(Sampling, configs.from_dict(sampling, Sampling, "sampling"))
        model, compute = self.config.model, self.config.compute
        with jax.set_mesh(self.mesh):
            completions = generate(
                model, compute, self.params, self.tokenizer, list(prompts), settings, say
            )
        return [completion.text for completion in completions]

    def find_classification(self, given: Iterable[tuple[str, str]] = ()) -> Classify:
        """The prompt and the labels that it was trained on, with those that are `given` instead.

        Raises UsageError if it was trained on none, or on several.
        """
        own = [note for note in self.tasks if note.task == "classify"]
        options = dict(own[0].options) if len(own) == 1 else {}
        options |= dict(given)
        if "labels" not in options:
            known = f"on {len(own)} classifications" if own else "on no classification"
            raise UsageError(
                f"{self.directory}: was trained {known}, so its labels are not known; give "
                "--task_options prompt=… labels=…, or train on a folder of gpt-jax prepare "
                "--task=classify"
            )
        try:
            return read_options("classify", tuple(options.items()))
        except ValueError as error:
            raise UsageError(f"--task_options {error}") from None

    def classify_prompts(
        self, prompts: Sequence[str], options: Classify, say: Say = tell
    ) -> list[Classified]:
        """The label of each prompt, see `classify`."""
        model, compute = self.config.model, self.config.compute
        with jax.set_mesh(self.mesh):
            return classify_prompts(
                model, compute, self.params, self.tokenizer, prompts, options, say
            )

    def classify(
        self, texts: str | Sequence[str | Mapping[str, Any]], say: Say = tell, **options: Any
    ) -> list[Classified]:
        """The likeliest label of each text, and the probability of each label among all of them.

        Prompt and labels are those of its training, unless `options` has others: `prompt`, and
        `labels`, which is {value: what is written for it}. Where the prompt has several columns, a
        text is a mapping of them. A prompt that does not fit the context loses its first tokens,
        and `say` tells it.

        Raises UsageError if prompt or labels are not known, or if a text is empty.
        """
        given = [
            (name, value if isinstance(value, str) else json.dumps(value))
            for name, value in options.items()
        ]
        found = self.find_classification(given)
        rows = [texts] if isinstance(texts, str | Mapping) else list(texts)
        prompts = [make_text_prompt(number, row, found) for number, row in enumerate(rows, 1)]
        return self.classify_prompts(prompts, found, say)


def make_text_prompt(number: int, row: str | Mapping[str, Any], options: Classify) -> str:
    """The prompt of a text. Raises UsageError, which tells its number."""
    if isinstance(row, str):
        column, *others = options.inputs
        if others:
            raise UsageError(
                f"text {number}: the prompt has the columns {', '.join(options.inputs)}; give a "
                "mapping of them, or a file with --file"
            )
        row = {column: row}
    try:
        return make_prompt(row, options)
    except ValueError as error:
        raise UsageError(f"text {number}: {error}") from None


def is_one(text: Any) -> bool:
    """Whether this is one text, or the ids of one, and not a list of several."""
    if isinstance(text, str):
        return True
    return len(text) > 0 and all(isinstance(entry, int | np.integer) for entry in text)


def is_empty_before_ids(context: Any, continuation: Any) -> bool:
    """Whether a context without entries is that of ids, and not a list of no contexts."""
    return len(context) == 0 and any(not isinstance(part, str) for part in continuation)


def make_requests(tokenizer: Tokenizer, pairs: Iterable[tuple[Any, Any]]) -> list[Request]:
    """Requests of pairs of texts, or of pairs of ids, in their order.

    An empty context becomes the start token. Raises UsageError for a pair of a text and ids, and
    for an empty context if the tokenizer has no such token.
    """
    requests = [Request(*pair) for pair in pairs]
    is_text = [tuple(isinstance(part, str) for part in pair) for pair in requests]
    for number, kinds in enumerate(is_text, 1):
        if len(set(kinds)) > 1:
            raise UsageError(
                f"pair {number}: one part is a text and the other is ids; give both alike"
            )

    texts = [number for number, kinds in enumerate(is_text) if kinds[0]]
    pairs_of_texts = [cast(tuple[str, str], tuple(requests[number])) for number in texts]
    for number, request in zip(texts, encode_pairs(tokenizer, pairs_of_texts), strict=True):
        requests[number] = request
    return [
        request if len(request.context) else start_request(tokenizer, request.continuation)
        for request in requests
    ]
