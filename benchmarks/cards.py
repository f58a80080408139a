"""Makes the card of every shipped row, and the pages in docs/.

    python benchmarks/cards.py [--only NAME …]   # makes cards that are missing in cards.json
    python benchmarks/cards.py --anew            # makes all of them
    python benchmarks/cards.py --pages           # writes docs/cards.md and docs/cards/ from there

Cards are made one after the other, in this process. Each is kept as soon as it is made, so a second
process may make others with --only. `cpu_seconds` of a card are those of the processor. A process
starts without compiled programs, so earlier runs of this file do not make a card cheaper. Programs
are compiled without LLVM's optimiser, because they run for milliseconds. Two checks need the extras
`eval` and `reference`; without them a card says so.
"""

import argparse
import json
import os
import sys
import tempfile
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "benchmarks/cards.json"
PAGES = ROOT / "docs/cards"
SUMMARY = ROOT / "docs/cards.md"
FAST = "--xla_backend_optimization_level=0"
# Whose vocabulary only a text can tell; the docstring of each config has the size.
VOCAB = "--config.model.vocab="
CHARACTERS = f"{VOCAB}65"
ROWS = {
    "gpt2.py:124m": (),
    "gpt2.py:350m": (),
    "gpt2.py:774m": (),
    "gpt2.py:1558m": (),
    "guide.py": (),
    "llama.py:1b": (),
    "llama.py:8b": (),
    "llama.py:70b": (),
    "mixture.py": (f"{VOCAB}4096",),
    "modern.py:d12": (),
    "modern.py:d12-windows": (),
    "modern.py:d20": (),
    "modern.py:d26": (),
    "moe.py:8x7b": (),
    "moe.py:small": (),
    "quickstart.py": (),
    "shakespeare_char.py:cpu": (CHARACTERS,),
    "shakespeare_char.py:gpu": (CHARACTERS,),
    "tiny.py": (),
}
# Its model is that of a checkpoint, whose own card `gpt-jax card --checkpoint` makes.
WITHOUT_SHAPE = {"finetune.py"}
TITLE = """# Cards

A card says what a config can do, with a figure and a date for each check. `gpt-jax card` makes one,
of a config or of a checkpoint:

```sh
gpt-jax card --config=configs/gpt2.py:124m --out=card.md
gpt-jax card --checkpoint=runs/tiny
```

A config is too large for a CPU, so its card is made on a tiny shape that keeps its features. Each
page names the rule and both shapes. `fits` is about the config's own shape. A checkpoint of at most
four million parameters is checked with its own weights. The command ends with code 2 if a check
fails. A check that cannot be made gives its reason, and is no pass.

| check | what is done |
|---|---|
"""
END = """
"pass" and "FAIL" are verdicts, and "-" is a check that could not be made; the row's page has the
reason. `python benchmarks/cards.py --anew` makes all rows again, and `--pages` writes these pages.
"""


def read_cards() -> dict:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def keep_card(name: str, card: dict) -> None:
    """Writes a card into the file as it is now; another process may have added some meanwhile."""
    from gpt_jax.files import hold_lock, replace_file

    with hold_lock(Path(tempfile.gettempdir()) / "gpt_jax_cards.lock"):
        content = json.dumps(read_cards() | {name: card}, indent=1) + "\n"
        replace_file(FILE, content.encode())


def make_cards(names: list[str], compiled: str) -> None:
    """Makes the cards of these rows. JAX starts here, after its environment is set.

    Compiled programs are kept in the folder `compiled`.
    """
    os.environ["XLA_FLAGS"] = " ".join([*os.environ.get("XLA_FLAGS", "").split(), FAST])
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # Every check reads local files alone.
    from gpt_jax.commands import card as command
    from gpt_jax.commands.runtime import start_runtime

    flags = command.make_flags()
    start_runtime(flags.parse_args(["--config=any", f"--compilation_cache={compiled}"]))
    import jax

    from gpt_jax.card import to_data

    os.chdir(ROOT)
    for name in names:
        args = flags.parse_args([f"--config=configs/{name}"])
        began = time.process_time()
        card = to_data(command.make_card_of(args, list(ROWS[name])))
        seconds = round(time.process_time() - began)
        keep_card(name, card | {"cpu_seconds": seconds})
        print(f"{name}: {seconds} s of CPU time", file=sys.stderr, flush=True)
        jax.clear_caches()  # Programs hold mappings, of which a process has only so many.


def make_pages() -> dict[Path, str]:
    """The page of each card and the summary, by the file that they belong into."""
    from gpt_jax.card import CHECKS, format_page, format_summary, name_file

    made = read_cards()
    cards = [made[name] for name in ROWS if name in made]
    pages = {PAGES / name_file(card["name"]): format_page(card) for card in cards}
    rows = "".join(f"| {name} | {check.how} |\n" for name, check in CHECKS.items())
    table = format_summary(cards, PAGES.name)
    cost = fill(describe_cost(cards))
    missing = [name for name in ROWS if name not in made]
    if missing:
        cost += fill(f"No card has been made of {', '.join(missing)}.")
    return pages | {SUMMARY: f"{TITLE}{rows}\n{table}\n{END}{cost}"}


def describe_cost(cards: list[dict]) -> str:
    """What these cards took, and what of them was shared."""
    seconds = sorted(card["cpu_seconds"] for card in cards)
    return (
        f"Making these {len(cards)} cards took {sum(seconds) / 60:.0f} minutes of CPU time, "
        f"{seconds[0]} to {seconds[-1]} s each. Programs that an earlier card of the same process "
        "had compiled were not compiled again."
    )


def fill(paragraph: str) -> str:
    lines = textwrap.fill(paragraph, 100, break_on_hyphens=False)
    return f"\n{lines}\n"


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--only", nargs="+", default=[""], metavar="NAME")
    flags.add_argument("--anew", action="store_true")
    flags.add_argument("--pages", action="store_true")
    args = flags.parse_args()
    if args.pages:
        PAGES.mkdir(exist_ok=True)
        for path, text in make_pages().items():
            path.write_text(text)
        return
    names = [name for name in ROWS if any(part in name for part in args.only)]
    if not names:
        raise SystemExit(f"--only={' '.join(args.only)}: no row has that in its name")
    there = {} if args.anew else read_cards()
    with tempfile.TemporaryDirectory() as compiled:
        make_cards([name for name in names if name not in there], compiled)


if __name__ == "__main__":
    main()
