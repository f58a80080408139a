"""`gpt-jax generate`: continues prompts from a checkpoint.

Standard output gets the generated text and nothing else.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from gpt_jax.commands.flags import Flags, add_checkpoint_flags
from gpt_jax.commands.output import make_say, output
from gpt_jax.commands.runtime import add_runtime_flags, end_on_request, start_runtime
from gpt_jax.errors import UsageError

# The help of each field of `Sampling` that is a flag.
HELP = {
    "max_new_tokens": "tokens to add",
    "temperature": "0: always the most likely token",
    "top_k": "only the k most likely tokens; 0: off",
    "top_p": "the fewest tokens that hold this probability; 1: off",
    "min_p": "tokens of at least this part of the best one's probability; 0: off",
    "repetition_penalty": "above 1: tokens already there become less likely",
    "seed": "another seed, another text",
    "num_samples": "continuations of each prompt",
    "truncate": "cut a prompt that does not fit the context, from the left",
}


def main(arguments: list[str]) -> None:
    """Raises UsageError for a checkpoint, a prompt or a setting that cannot be used.

    Raises NoCheckpoint for a damaged checkpoint.
    """
    from gpt_jax.infer import Sampling

    args = make_flags().parse_args(arguments)
    prompts = read_prompts(args.prompt, args.prompts)
    args.devices = choose_devices(args)
    settings = {name: getattr(args, name) for name in HELP}
    sampling = Sampling(stop=tuple(args.stop), **settings)

    start_runtime(args)
    end_on_request()
    run(args, prompts, sampling)


def make_flags() -> Flags:
    flags = Flags(
        prog="gpt-jax generate",
        description="Continue one or more prompts. A single continuation is printed as it grows. "
        "Several are printed one after another, each ended by a newline, or as JSON lines with "
        "--json.",
    )
    add_checkpoint_flags(flags)
    flags.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="a text to continue; may be given several times",
    )
    flags.add_argument("--prompts", metavar="FILE", help="a file with a prompt on each line")
    flags.add_argument(
        "--stop",
        action="append",
        default=[],
        help="end before this text; may be given several times",
    )
    flags.add_argument(
        "--json",
        action="store_true",
        help="a JSON object a line: prompt, sample, text, finish, tokens",
    )
    add_sampling_flags(flags)
    flags.add_argument(
        "--devices",
        type=int,
        default=None,
        metavar="N",
        help="devices of this machine to use; 0: all. Without it: 1, but all with --cpu_devices "
        "or several processes",
    )
    flags.add_argument(
        "--ignore_miscompiles",
        action="store_true",
        help="go on although this machine's compiler is known to give wrong results",
    )
    add_runtime_flags(flags)
    return flags


def add_sampling_flags(flags: Flags) -> None:
    """Adds a flag for each field of `Sampling` that has a help, with the field's default."""
    from gpt_jax.infer import Sampling

    for spec in fields(Sampling):
        if spec.name not in HELP:
            continue
        if isinstance(spec.default, bool):
            flags.add_argument(f"--{spec.name}", action="store_true", help=HELP[spec.name])
        else:
            flags.add_argument(
                f"--{spec.name}",
                type=type(spec.default),
                default=spec.default,
                help=HELP[spec.name],
            )


def choose_devices(args: argparse.Namespace) -> int:
    """The number of devices to use, where 0 means all. Raises UsageError."""
    uses_all = args.cpu_devices or args.num_processes > 1 or args.distributed
    if args.devices is None:
        return 0 if uses_all else 1

    if args.devices < 0:
        raise UsageError(f"--devices={args.devices}: expected 0 or more")
    if uses_all and args.devices:
        raise UsageError(
            f"--devices={args.devices}: several processes, and --cpu_devices, use all devices; "
            "leave it out"
        )
    return args.devices


def read_prompts(texts: list[str], file: str | None) -> list[str]:
    """The prompts `texts` and then the lines of `file`.

    Without any it is one empty prompt, which starts a document. Raises UsageError for a file that
    cannot be read.
    """
    lines = []
    if file is not None:
        try:
            text = Path(file).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
            lines = text.removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts={file}: cannot be read: {error}") from None
    return [*texts, *lines] or [""]


def run(args: argparse.Namespace, prompts: list[str], sampling) -> None:
    """Loads the checkpoint, generates, and prints the texts."""
    import jax

    from gpt_jax.run import load_model

    is_first = jax.process_index() == 0
    say = make_say(sys.stderr)
    loaded = load_model(
        args.checkpoint,
        args.step,
        say,
        args.devices,
        ignore_miscompiles=args.ignore_miscompiles,
        is_decoding=True,
        mirror=args.mirror,
        base=args.base,
    )

    began = time.perf_counter()
    is_alone = len(prompts) * sampling.num_samples == 1 and not args.json
    completions = generate(loaded, prompts, sampling, say, is_first and is_alone)
    if is_first and is_alone and sys.stdout.isatty():
        write("\n")
    elif is_first and not is_alone:
        lines = [completion.text for completion in completions]
        if args.json:
            lines = [as_json(prompts, completion) for completion in completions]
        write("".join(f"{line}\n" for line in lines))

    tokens = sum(len(completion.tokens) for completion in completions)
    seconds = time.perf_counter() - began
    ends = ", ".join(sorted({completion.finish for completion in completions}))
    say(f"{tokens} tokens in {seconds:.1f} s, compilation included; ended by {ends}")


def generate(
    loaded, prompts: list[str], sampling, say: Callable[[str], None], is_streamed: bool
) -> list:
    """The completions, in the order of prompts and samples.

    If `is_streamed`, each piece of text is printed at once.
    """
    import jax

    from gpt_jax.infer import stream_text

    rows = []  # (number of the row, its completion)
    with jax.set_mesh(loaded.mesh):
        pieces = stream_text(
            loaded.config.model,
            loaded.config.compute,
            loaded.params,
            loaded.tokenizer,
            prompts,
            sampling,
            say,
        )
        for piece in pieces:
            if is_streamed:
                write(piece.text)
            if piece.completion:
                rows.append((piece.row, piece.completion))
    return [completion for _, completion in sorted(rows)]


def write(text: str) -> None:
    """Writes to standard output, as UTF-8 whatever the terminal's locale says."""
    with output() as stream:
        stream.buffer.write(text.encode("utf-8", "replace"))
        stream.buffer.flush()


def as_json(prompts: list[str], completion) -> str:
    """One line of --json."""
    values = {
        "prompt": prompts[completion.prompt],
        "sample": completion.sample,
        "text": completion.text,
        "finish": completion.finish,
        "tokens": len(completion.tokens),
    }
    return json.dumps(values, ensure_ascii=False)
