"""What must agree across fields on every mesh."""

from pathlib import Path

from gpt_jax.config.check_list import Checks
from gpt_jax.config.fields import Config
from gpt_jax.config.knobs import ENDLESS, EVALUATORS, FFNS, MIXERS
from gpt_jax.config.layers import has_experts
from gpt_jax.config.ramp_checks import check_ramps
from gpt_jax.config.remat import REMAT_NAMES, list_marked, list_unread
from gpt_jax.config.resolve import wsd_start


def faults(config: Config, tokenizer_vocab: int = 0) -> list[str]:
    """The disagreements that every mesh has, a line each.

    The model of a config without faults can be traced.
    """
    checks = Checks(config)
    _check_heads(checks)
    _check_layers(checks)
    if config.model.pattern and config.model.windows:
        _check_parts(checks)
        _check_gates(checks)
        _check_text(checks, tokenizer_vocab)
        _check_evaluators(checks)
        _check_export(checks)
        _check_sets(checks)
        _check_schedule(checks)
        check_ramps(checks)
        _check_router(checks)
        _check_remat(checks)
        _check_lora(checks)
    return checks.lines


def _check_heads(checks: Checks) -> None:
    """Heads, positions and the context."""
    model = checks.config.model
    seq_len = checks.config.train.seq_len

    checks.need(
        model.head_dim > 0,
        "model.heads",
        f"does not divide config.model.embed = {model.embed}; "
        "choose a divisor or set config.model.head_dim",
    )
    checks.need(
        model.heads % model.kv_heads == 0,
        "model.kv_heads",
        f"must divide config.model.heads = {model.heads}",
    )

    # Rotary embeddings turn pairs of channels.
    is_even = int(model.head_dim * model.rope_fraction) % 2 == 0
    checks.need(
        is_even or model.position != "rotary",
        "model.rope_fraction",
        f"rotates an odd number of the {model.head_dim} channels of a head; choose an even part",
    )
    checks.need(
        model.rope_local_base == 0 or model.rope_local_base >= 1,
        "model.rope_local_base",
        "is a base below 1; choose one of at least 1, or 0 for that of the other layers",
    )
    checks.need(
        model.rope_scale_low < model.rope_scale_high,
        "model.rope_scale_high",
        f"must be above config.model.rope_scale_low = {model.rope_scale_low}",
    )
    checks.need(
        model.max_seq >= seq_len,
        "model.max_seq",
        f"is shorter than config.train.seq_len = {seq_len}",
    )


def _check_layers(checks: Checks) -> None:
    """The pattern and the windows of the layers."""
    model = checks.config.model
    need = checks.need

    need(bool(model.pattern), "model.pattern", "needs at least one (mixer, feed-forward) pair")
    need(bool(model.windows), "model.windows", "needs at least one entry; 0 means no window")
    need(
        all(size >= 0 for size in model.windows),
        "model.windows",
        "entries must be 0 (all) or positive",
    )
    for mixer, ffn in model.pattern:
        need(
            mixer in MIXERS,
            "model.pattern",
            f"unknown mixer {mixer!r}; choose from {', '.join(MIXERS)}",
        )
        need(
            ffn in FFNS,
            "model.pattern",
            f"unknown feed-forward {ffn!r}; choose from {', '.join(FFNS)}",
        )


def _check_parts(checks: Checks) -> None:
    """Fields that only go with some values of others."""
    model = checks.config.model
    checks.need(
        not (model.bias and model.biased != "none"),
        "model.biased",
        "says where biases are although `bias` is false; set config.model.bias=False",
    )
    checks.need(
        not model.parallel or model.norm_position == "pre",
        "model.parallel",
        f"needs config.model.norm_position = 'pre', not {model.norm_position!r}",
    )


def _check_gates(checks: Checks) -> None:
    """Gates that read some channels of the stream."""
    model = checks.config.model
    too_wide = f"is wider than config.model.embed = {model.embed}"
    for name, is_used in (("value_embed_gate", model.value_embed), ("smear_gate", model.smear)):
        fits = getattr(model, name) <= model.embed
        checks.need(fits or not is_used, f"model.{name}", too_wide)


def _check_text(checks: Checks, tokenizer_vocab: int) -> None:
    """The vocabulary, the held-out text and the chunks of a row."""
    config = checks.config
    train = config.train

    # A tokenizer that is not known yet has the size 0.
    checks.need(
        config.model.vocab >= tokenizer_vocab,
        "model.vocab",
        f"is smaller than the tokenizer's {tokenizer_vocab}; set 0 to follow the tokenizer",
    )
    has_heldout = config.data.eval_fraction > 0 or bool(config.data.eval_path)
    checks.need(
        has_heldout or not config.eval.compare_xz,
        "eval.compare_xz",
        "needs held-out text, and config.data.eval_fraction is 0",
    )
    checks.need(
        config.eval.stride <= train.seq_len,
        "eval.stride",
        f"leaves tokens out between rows of config.train.seq_len = {train.seq_len}; choose that, "
        "or less",
    )
    checks.need(
        not train.loss_chunk or train.seq_len % train.loss_chunk == 0,
        "train.loss_chunk",
        f"must divide config.train.seq_len = {train.seq_len}",
    )


def _check_evaluators(checks: Checks) -> None:
    """The names of what an evaluation measures."""
    asked = checks.config.eval.evaluators
    keep_best = checks.config.checkpoint.keep_best
    checks.need(
        set(asked) <= set(EVALUATORS), "eval.evaluators", f"choose among {', '.join(EVALUATORS)}"
    )
    questions = checks.config.eval.questions
    checks.need(
        "questions" not in asked or bool(questions),
        "eval.evaluators",
        "has questions, and config.eval.questions names no file; set that too",
    )
    checks.need(
        "questions" in asked or not questions,
        "eval.questions",
        "is asked by no evaluator; add 'questions' to config.eval.evaluators",
    )
    checks.need(
        "heldout" in asked or not keep_best,
        "eval.evaluators",
        f"has no heldout, and config.checkpoint.keep_best = {keep_best} goes by its loss",
    )
    checks.need(
        checks.config.eval.every_steps > 0 or not keep_best,
        "checkpoint.keep_best",
        "compares evaluations, and config.eval.every_steps = 0 leaves only the last one; "
        "set config.eval.every_steps",
    )


def _check_export(checks: Checks) -> None:
    """What is written beside checkpoints."""
    checkpoint = checks.config.checkpoint
    checks.need(
        not checkpoint.export_every_steps or checkpoint.export != "none",
        "checkpoint.export_every_steps",
        "has no form to write, because config.checkpoint.export = 'none'; set that to hf",
    )


# Names that `gpt-jax evaluate` gives to rows of its own.
ROW_NAMES = ("all", "held-out")


def _check_sets(checks: Checks) -> None:
    """The names and paths of further held-out texts."""
    config = checks.config
    names = [name for name, _ in config.eval.sets]
    # A set of several sources has metrics named set/source.
    sources = [name.split("/")[0] for name, _, _ in config.data.sources]
    # Metrics of questions have the name of their file in the same place.
    questions = [Path(path).stem for path in config.eval.questions]
    for i, (name, path) in enumerate(config.eval.sets):
        place = f"eval.sets[{i}]"
        is_word = name.isprintable() and not any(c == "/" or c.isspace() for c in name)
        checks.need(bool(name and path), place, "needs both a name and a path")
        checks.need(
            is_word, place, "its name has a space, a slash or a control character; use one word"
        )
        checks.need(
            names.index(name) == i, place, "its name is that of a set before it; choose another"
        )
        checks.need(
            name not in ROW_NAMES, place, "is the name of a row of gpt-jax evaluate; choose another"
        )
        checks.need(
            name not in sources,
            place,
            "its name is that of a source of config.data.sources; choose another",
        )
        checks.need(
            name not in questions,
            place,
            "its name is that of a file of config.eval.questions; choose another",
        )
    checks.need(
        not names or "heldout" in config.eval.evaluators,
        "eval.sets",
        "is measured by no evaluator; add 'heldout' to config.eval.evaluators",
    )


def _check_schedule(checks: Checks) -> None:
    """The optimiser's schedule."""
    optim = checks.config.optim
    decay_start = wsd_start(optim)

    checks.need(
        not optim.muon_momentum_final or optim.schedule == "wsd",
        "optim.muon_momentum_final",
        f"follows the decay of wsd, but config.optim.schedule = {optim.schedule!r}; use wsd, or 0",
    )
    checks.need(
        optim.warmup_steps <= optim.decay_steps or optim.schedule in ENDLESS,
        "optim.warmup_steps",
        f"is beyond the end of the schedule at step {optim.decay_steps}; "
        "lower it or set config.optim.decay_steps",
    )
    checks.need(
        optim.schedule != "wsd" or optim.warmup_steps <= decay_start,
        "optim.decay_fraction",
        f"decay would start at step {decay_start}, before "
        f"config.optim.warmup_steps = {optim.warmup_steps} are over; lower one of them",
    )


def _check_router(checks: Checks) -> None:
    """The mixture of experts, if the pattern has one."""
    model = checks.config.model
    is_dropless = has_experts(model) and model.dispatch == "dropless"
    checks.need(
        is_dropless or checks.config.compute.expert_matmul == "auto",
        "compute.expert_matmul",
        "is for dropless experts, and the model has none; leave this out",
    )
    if not has_experts(model):
        return

    checks.need(
        model.dispatch != "capacity" or not checks.config.data.document_mask,
        "model.dispatch",
        "lets a document push another one of its row out of an expert, and "
        "config.data.document_mask = True keeps documents apart; use dropless, or set "
        "config.data.document_mask to false",
    )

    checks.need(
        model.experts_per_token <= model.experts,
        "model.experts_per_token",
        f"is more than config.model.experts = {model.experts}",
    )
    checks.need(
        model.dispatch != "capacity" or model.capacity_factor > 0,
        "model.capacity_factor",
        "leaves an expert no token; expected more than 0, such as 1.25",
    )


# The lists of names that go with remat `names`.
NAME_LISTS = ("remat_save", "remat_offload")


def _check_remat(checks: Checks) -> None:
    """The names of values that the remat policy keeps."""
    compute = checks.config.compute
    if compute.remat != "names":
        for field in NAME_LISTS:
            checks.need(
                not getattr(compute, field),
                f"compute.{field}",
                f"does nothing with config.compute.remat = {compute.remat!r}; set that to names, "
                "or leave this out",
            )
        return

    checks.need(
        bool(compute.remat_save or compute.remat_offload),
        "compute.remat",
        "keeps nothing without names; set config.compute.remat_save or "
        "config.compute.remat_offload, or use block",
    )
    for field in NAME_LISTS:
        for name in getattr(compute, field):
            reason = _find_name_fault(checks.config, field, name)
            checks.need(not reason, f"compute.{field}", f"{name!r} {reason}")


def _find_name_fault(config: Config, field: str, name: str) -> str:
    """Why a name cannot be in this list, with the way out, or "" if it can."""
    compute = config.compute
    if name not in REMAT_NAMES:
        return f"is not known; choose from {', '.join(REMAT_NAMES)}"
    marked = list_marked(config.model)
    if name not in marked:
        return f"is in no layer of config.model.pattern; choose from {', '.join(marked)}"
    if name in compute.remat_save and name in compute.remat_offload:
        return "is in both lists of names; leave it in one"
    if name == "layer_in" and field == "remat_save":
        return "is kept in any case; leave it out, or move it to config.compute.remat_offload"
    if name in list_unread(config.model):
        return (
            "is not read by the backward pass with config.model.norm_position = 'pre' and "
            f"config.model.parallel = {config.model.parallel}; leave it out"
        )
    return ""


def _check_lora(checks: Checks) -> None:
    """Adapters, and what goes with them."""
    config = checks.config
    checks.need(
        not config.lora.rank or bool(config.init.from_),
        "lora.rank",
        "needs weights beneath the adapters; name them with config.init.from, or set 0",
    )
    checks.need(
        not config.lora.rank or config.lora.alpha > 0,
        "lora.alpha",
        "would silence every adapter; choose more than 0",
    )
    checks.need(
        not config.lora.rank or bool(config.lora.targets),
        "lora.targets",
        "names nothing that could have an adapter; name a role, such as matrix",
    )
    checks.need(
        not config.lora.rank or not config.init.optimizer,
        "init.optimizer",
        "takes over moments of weights, and config.lora.rank lets adapters alone be learned; "
        "leave one of them out",
    )
