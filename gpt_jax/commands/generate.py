"""`gpt-jax generate`: continues prompts from a checkpoint. Standard output gets the generated
text and nothing else."""

import json
import sys
import time
from dataclasses import fields
from pathlib import Path

from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import make_say, output
from gpt_jax.commands.runtime import add_runtime_flags, end_on_request, start_runtime
from gpt_jax.errors import UsageError

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
    """Raises UsageError for a checkpoint, prompt or setting that cannot be used, NoCheckpoint
    for damage."""
    from gpt_jax.infer import Sampling

    flags = Flags(
        prog="gpt-jax generate",
        description="Continue one or more prompts. A single continuation streams; "
        "several are printed one after another, each ended by a newline (or as JSON lines with "
        "--json).",
    )
    flags.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a workdir, its checkpoints, or one step"
    )
    flags.add_argument("--step", type=int, default=0, help="which step; 0: the newest valid one")
    flags.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="a text to continue; may be given several times",
    )
    flags.add_argument("--prompts", metavar="FILE", help="a prompt on each line")
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
    for spec in fields(Sampling):
        if spec.name in HELP and isinstance(spec.default, bool):
            flags.add_argument(f"--{spec.name}", action="store_true", help=HELP[spec.name])
        elif spec.name in HELP:
            flags.add_argument(
                f"--{spec.name}",
                type=type(spec.default),
                default=spec.default,
                help=HELP[spec.name],
            )
    flags.add_argument(
        "--devices",
        type=int,
        default=None,
        metavar="N",
        help="devices of this machine to use; 0: all, as with --cpu_devices and several processes; "
        "else 1",
    )
    flags.add_argument(
        "--ignore_miscompiles",
        action="store_true",
        help="go on although this machine's compiler is known to give wrong results",
    )
    add_runtime_flags(flags)
    args = flags.parse_args(arguments)
    prompts = read_prompts(args.prompt, args.prompts)
    if args.devices is not None and args.devices < 0:
        raise UsageError(f"--devices={args.devices}: expected 0 or more")
    several = args.cpu_devices or args.num_processes > 1 or args.distributed
    if several and args.devices:
        raise UsageError(
            f"--devices={args.devices}: several processes, and --cpu_devices, use all devices; "
            "leave it out"
        )
    if args.devices is None:
        args.devices = 0 if several else 1
    sampling = Sampling(stop=tuple(args.stop), **{name: getattr(args, name) for name in HELP})
    start_runtime(args)
    end_on_request()
    run(args, prompts, sampling)


def read_prompts(given: list[str], file: str | None) -> list[str]:
    """The prompts in order; without any, one empty prompt, which starts a document."""
    lines = []
    if file is not None:
        try:
            text = Path(file).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
            lines = text.removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts={file}: cannot be read: {error}") from None
    return [*given, *lines] or [""]


def run(args, prompts, sampling) -> None:
    """Loads, generates, writes."""
    import jax

    from gpt_jax.infer import stream_text
    from gpt_jax.run import load_model

    first = jax.process_index() == 0
    say = make_say(sys.stderr)
    loaded = load_model(
        args.checkpoint, args.step, say, args.devices, ignore_miscompiles=args.ignore_miscompiles
    )
    single = len(prompts) * sampling.num_samples == 1 and not args.json
    done, began = [], time.perf_counter()
    with jax.set_mesh(loaded.mesh):
        for piece in stream_text(
            loaded.config.model,
            loaded.config.compute,
            loaded.params,
            loaded.tokenizer,
            prompts,
            sampling,
            say,
        ):
            if single and first:
                write(piece.text)
            if piece.completion:
                done.append((piece.row, piece.completion))
    done = [completion for _, completion in sorted(done)]
    if first and not single:
        write(
            "".join(
                (
                    json.dumps(as_json(prompts, completion), ensure_ascii=False)
                    if args.json
                    else completion.text
                )
                + "\n"
                for completion in done
            )
        )
    elif first and sys.stdout.isatty():
        write("\n")
    tokens = sum(len(completion.tokens) for completion in done)
    seconds = time.perf_counter() - began
    say(
        f"{tokens} tokens in {seconds:.1f} s, compilation included; ended by "
        + ", ".join(sorted({completion.finish for completion in done}))
    )


def write(text: str) -> None:
    """To standard output, as UTF-8 whatever the terminal's locale says."""
    with output() as stream:
        stream.buffer.write(text.encode("utf-8", "replace"))
        stream.buffer.flush()


def as_json(prompts, completion) -> dict:
    """One line of --json."""
    return {
        "prompt": prompts[completion.prompt],
        "sample": completion.sample,
        "text": completion.text,
        "finish": completion.finish,
        "tokens": len(completion.tokens),
    }
