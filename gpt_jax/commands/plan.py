"""`gpt-jax plan`: whether a run fits on hardware that is not here, and how fast it could be."""

import argparse
import json
import math
import os
from pathlib import Path

from gpt_jax import config as configs
from gpt_jax.commands.compiling import compile_here, compile_outside, need_compiler
from gpt_jax.commands.config_file import load_config, split_overrides
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit
from gpt_jax.commands.runtime import end_on_request
from gpt_jax.errors import UsageError

MISSES = 3  # programs that do not fit, which --search compiles before it gives up


def main(arguments: list[str]) -> None:
    """Raises UsageError (after the report) for what does not fit or cannot run, and for what was
    typed wrong."""
    flags = Flags(
        prog="gpt-jax plan",
        description="Preflight: memory, collectives, step time and MFU of a config on a "
        "machine that need not exist. Exit code 0: it fits; 2: it does not, or cannot run as it is.",
    )
    flags.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="a file in configs/, and its variant"
    )
    flags.add_argument(
        "--topology",
        required=True,
        metavar="NAME:SHAPE",
        help="the machine, as in v5p:4x4x4 or h100:64",
    )
    flags.add_argument(
        "--slices",
        type=int,
        default=1,
        metavar="N",
        help="slices of that shape, over the data centre network (TPU)",
    )
    flags.add_argument(
        "--compile",
        type=int,
        nargs="?",
        const=1,
        metavar="K",
        help="compile the train step for it, too; with --search the best K (minutes each)",
    )
    flags.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=10,
        metavar="N",
        help="try meshes, remat policies and microbatches, and show the best N",
    )
    flags.add_argument(
        "--data_tokens", type=float, default=0, help="tokens of the data, to count epochs"
    )
    flags.add_argument(
        "--write_bandwidth",
        type=float,
        default=1e9,
        metavar="B",
        help="bytes a second that a host writes to storage",
    )
    flags.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a compiler option more, as in --config.compute.compiler_options",
    )
    flags.add_argument("--keep_hlo", metavar="FILE", help="where the compiled program's text goes")
    flags.add_argument("--json", action="store_true", help="print JSON")
    flags.add_argument(
        "--inside", help=argparse.SUPPRESS
    )  # where a process of this command's own puts what it compiled
    end_on_request()  # and with it the compiler's process
    args = argparse.Namespace(
        json="--json" in arguments, topology=None, inside=None
    )  # for what cannot even be parsed
    try:
        args, rest = flags.parse_known_args(arguments)
        trouble = checked(args, rest)
    except UsageError as error:
        if args.json and not args.inside:
            refuse(args.topology, error)
        raise
    if trouble:
        raise UsageError(trouble)


def refuse(topology: str | None, error: UsageError) -> None:
    """The JSON of a refusal. UsageError, of both, where it cannot be written."""
    try:
        emit(json.dumps({"topology": topology, "fits": False, "problems": [str(error)]}, indent=2))
    except UsageError as unwritten:
        raise UsageError(f"{error}; and {unwritten}") from None


def checked(args, rest: list[str]) -> str:
    """The report, printed; what is wrong with the run, "" for nothing. UsageError where there is
    none to print."""
    check(args)
    import jax

    jax.config.update(
        "jax_platforms", "cpu"
    )  # nothing here needs an accelerator, and a run may be using it
    from gpt_jax.plan import is_searched, parse_topology

    topology = parse_topology(args.topology, args.slices)
    rest, notes = [f"--config.{key}={text}" for key, text in split_overrides(rest)], []
    config = load_config(args.config, rest)
    notes += [
        f"{given}: --search chooses that itself"
        for given in rest
        if args.search and is_searched(given)
    ]
    if topology.slices > 1 and set(configs.cross_slice(config.mesh).values()) == {1}:
        rest.append(f"--config.mesh.dcn_data={topology.slices}")
        notes.append(
            f"--slices={topology.slices}: no dcn_ size is set, so {rest[-1]} is taken; give it to train too"
        )
    if args.option:
        rest.append(
            f"--config.compute.compiler_options={(*config.compute.compiler_options, *args.option)}"
        )
    config = load_config(args.config, rest)
    if args.compile:
        need_compiler(topology)
    if args.inside:
        Path(args.inside).write_text(json.dumps(compile_here(config, topology, args)))
        return ""
    return plan(args, rest, config, topology, notes)


def check(args) -> None:
    """UsageError for a flag out of its range."""
    for name, least in (("compile", 1), ("search", 1)):
        if (given := getattr(args, name)) is not None and given < least:
            raise UsageError(f"--{name}={given}: expected {least} or more")
    if args.data_tokens and not 1 <= args.data_tokens < math.inf:
        raise UsageError(
            f"--data_tokens={args.data_tokens:g}: expected 1 or more tokens, or 0 where nobody knows"
        )
    if not args.search and (args.compile or 0) > 1:
        raise UsageError(
            f"--compile={args.compile}: without --search there is one program to compile; add --search, or leave "
            "the number out"
        )
    if args.keep_hlo is not None:
        check_keep(args)
    if not 1 <= args.write_bandwidth < math.inf:
        raise UsageError(
            f"--write_bandwidth={args.write_bandwidth:g}: expected 1 byte a second or more, as in 1e9"
        )
    if args.option and not args.compile:
        raise UsageError(
            f"--option={args.option[0]}: is for the compiler; add --compile, or leave it out"
        )
    for option in args.option:
        name, equals, _ = option.partition("=")
        if not (name and equals):
            raise UsageError(f"--option={option}: expected NAME=VALUE")


def check_keep(args) -> None:
    """UsageError for a --keep_hlo that gets nothing, or cannot."""
    if not args.compile:
        raise UsageError(
            f"--keep_hlo={args.keep_hlo}: there is no program without --compile; add it, or leave this out"
        )
    if args.search:
        raise UsageError(
            f"--keep_hlo={args.keep_hlo}: --search compiles one program after the other; plan the one it finds "
            "without --search"
        )
    file = Path(args.keep_hlo)
    if (
        file.is_dir()
        or not file.parent.is_dir()
        or not os.access(file if file.exists() else file.parent, os.W_OK)
    ):
        raise UsageError(
            f"--keep_hlo={args.keep_hlo}: cannot be written; name a file in a folder that is there and yours"
        )


def plan(args, rest: list[str], config, topology, notes: list[str]) -> str:
    """Prints the report, and returns what is wrong, "" for nothing. `notes`: lines ahead of it."""
    from gpt_jax.plan import (
        estimate_horizon,
        explain_nothing_fits,
        format_arithmetic,
        format_command,
        format_compiled,
        format_head,
        format_horizon,
        format_ranking,
        job_as_data,
        list_uncounted,
        make_job,
        ranking_as_data,
        search_meshes,
    )

    job, found, lines, out = make_job(config), [], [], {}
    if args.search:
        found = search_meshes(job, topology)
        if not found:
            raise UsageError(f"--search: {explain_nothing_fits(job, topology)}")
        shown = found[: args.search]
        lines += [f"{len(found)} combinations fit; the best by arithmetic", *format_ranking(shown)]
        out["search"] = ranking_as_data(job.config, shown)
    results = (
        examine_best(args, rest, job, found, topology)
        if found
        else [examine(args, rest, job, job.config, topology)]
    )
    if args.search and args.compile:
        lines += [
            f"compiled {place}: {mesh_summary(result)}" for place, result in enumerate(results, 1)
        ]
    best = min(results, key=lambda result: (not result["fits"], result["step"]))
    seen, whole = best["estimate"], job._replace(config=best["config"])
    by = "compiler" if best["schedule"] else "arithmetic"
    ahead = estimate_horizon(
        whole, topology, best["step"], by, args.data_tokens, args.write_bandwidth
    )
    lines = [
        *notes,
        *lines,
        *format_head(whole, topology, seen),
        *format_arithmetic(whole, topology, seen),
    ]
    out |= job_as_data(whole, topology, seen, ahead) | {
        "notes": [*notes, *list_uncounted(whole.config)]
    }
    if best["compiled"]:
        lines += format_compiled(topology, best["compiled"], best["schedule"], seen.memory.peak)
        out |= {"compiled": best["compiled"], "schedule": best["schedule"]}
    lines += [*list_uncounted(whole.config), *format_horizon(ahead)]
    if args.search and best["fits"]:
        words, replaced = winner(args.config, rest, best["config"])
        out["command"] = format_command(args.config, words)
        more = [
            f"{given}: does not divide over the best mesh, and is replaced" for given in replaced
        ]
        out["notes"] += more
        lines += [*more, f"best: {out['command']}"]
    trouble = add_trouble(job, topology, best, results, lines, out)
    emit(json.dumps(out, indent=2) if args.json else "\n".join(lines))
    return f"{topology}: {trouble}" if trouble else ""


def winner(spec: str, rest: list[str], best) -> tuple[list[str], list[str]]:
    """Overrides that make `best`, which a search has found, of the config of `spec`; and those
    of `rest`, not of fields that it searches, that it could not keep."""
    from gpt_jax.plan import is_searched, list_overrides, resolve_vocab

    given = [text for text in rest if not is_searched(text)]
    changes = list_overrides(resolve_vocab(load_config(spec, given)), best)
    keys = {change.partition("=")[0] for change in changes}
    replaced = [text for text in given if text.partition("=")[0] in keys]
    return [*(text for text in given if text not in replaced), *changes], replaced


def add_trouble(job, topology, best: dict, results: list[dict], lines: list[str], out: dict) -> str:
    """What is wrong with `best` of `results`, "" for nothing; adds it, and what would do
    instead, to the report."""
    from gpt_jax.plan import (
        explain_nothing_fits,
        find_advice,
        format_seconds,
        format_verdict,
        list_overrides,
        lower_limit,
    )

    seen, done = best["estimate"], best["compiled"] or {"refusal": "", "peak": 0}
    said = done["refusal"] or format_verdict(done["peak"] or seen.memory.peak, topology)
    trouble = [*seen.problems, *([] if best["fits"] else [said])]
    out |= {
        "by": "compiler" if best["compiled"] else "arithmetic",
        "fits": not trouble,
        "verdict": [*trouble, said][0],
        "problems": trouble,
    }
    lines += [f"problem: {line}" for line in trouble]
    if trouble and not is_fault(done):
        refused = [
            (result["estimate"].memory.peak, result["compiled"]["peak"])
            for result in results
            if result["compiled"] and not result["fits"]
        ]
        offers = find_advice(job, topology, lower_limit(topology, refused))
        lines += [
            f"would fit, by arithmetic: {' '.join(list_overrides(job.config, one))} "
            f"({format_seconds(found.step)} a step, {format_verdict(found.memory.peak, topology)})"
            for one, found in offers
        ]
        out["would_fit"] = [list_overrides(job.config, one) for one, _ in offers]
        if not offers:
            out["advice"] = explain_nothing_fits(job, topology)
            lines.append(f"no mesh, remat or accumulation helps: {out['advice']}")
    return trouble[0] if trouble else ""


def is_fault(done: dict | None) -> bool:
    """Whether the compiler refused for another reason than memory: a fault of its own, which
    other meshes may share."""
    return bool(done and done["refusal"]) and "RESOURCE_EXHAUSTED" not in done["refusal"]


def mesh_summary(result: dict) -> str:
    from gpt_jax.plan import format_mesh, format_seconds

    done = result["compiled"]
    made = f"{format_seconds(result['step'])} a step, peak {done['peak'] / 2**30:.1f} GiB, {done['seconds']:.0f} s"
    said = done["refusal"] or made
    return f"{format_mesh(result['estimate'].shape, result['config'].mesh.zero)}, remat {result['config'].compute.remat}: {said}"


def examine_best(args, rest: list[str], job, found: list, topology) -> list[dict]:
    """The first of `found`; with --compile=K, K that fit, best first. One that does not fit by
    the compiler rules out all that need as much by the arithmetic."""
    from gpt_jax.plan import CLOSE

    results, limit = [], float("inf")
    for one, seen in found:
        if seen.memory.peak >= limit:
            continue
        results.append(examine(args, rest, job, one, topology))
        if not results[-1]["fits"]:
            limit = CLOSE * seen.memory.peak
        enough = sum(result["fits"] for result in results) >= (args.compile or 1)
        if (
            enough
            or len(results) >= MISSES + (args.compile or 0)
            or is_fault(results[-1]["compiled"])
        ):
            break
    return results


def examine(args, rest: list[str], job, config, topology) -> dict:
    """One config: the arithmetic, and with --compile the program."""
    from gpt_jax.plan import estimate_job, estimate_schedule, list_overrides

    job = job._replace(config=config)
    seen = estimate_job(job, topology)
    result = {
        "config": config,
        "estimate": seen,
        "compiled": None,
        "schedule": None,
        "step": seen.step,
        "fits": seen.fits,
    }
    if not args.compile or seen.problems:
        return result
    pass

    base = load_config(args.config, rest)
    more = list_overrides(base, config)
    done = compile_outside(args, [*rest, *more])
    result |= {
        "compiled": done,
        "fits": not done["refusal"] and done["peak"] <= topology.chip.memory,
    }
    if not done["refusal"]:
        time = estimate_schedule(job, topology, seen.kernel, done["program"])
        result |= {"schedule": time._asdict(), "step": time.step}
    return result
