"""README and docs/ name only what exists.

Checked are links, files, commands, flags, config keys, messages and the map of the house. Each rule
takes pages and returns what is wrong in them. Each is also shown a small page that breaks it.
"""

import ast
import dataclasses
import functools
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from gpt_jax import config
from gpt_jax.commands import launch, main
from gpt_jax.config.knobs import fields_of
from gpt_jax.config.read import RENAMED

ROOT = Path(__file__).resolve().parents[1]
README_LINES = 200
FOLDERS = "gpt_jax|configs|launch|tests|benchmarks|examples|docs"
SECTIONS = {field.name: field.type for field in dataclasses.fields(config.Config)}
# `train.bin` is no config key.
FILE_ENDINGS = {
    "bin",
    "py",
    "json",
    "jsonl",
    "md",
    "txt",
    "idx",
    "npy",
}


def read_pages() -> dict[str, str]:
    """Text by path from the root."""
    roots = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")]
    paths = [*roots, *sorted((ROOT / "docs").glob("*.md"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str) -> str:
    """The lines of fenced blocks, with continued lines joined."""
    found = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\\\n\s*", "", "\n".join(found))


def inline(text: str) -> list[str]:
    """The texts in backticks in the prose."""
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", without_blocks(text), flags=re.MULTILINE)
    return {
        re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles
    }


def broken_links(pages: dict[str, str]) -> list[str]:
    found = []

    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(text)):
            path, _, anchor = target.partition("#")
            if target.startswith(("http:", "https:")):
                continue
            there = ((ROOT / page).parent / path).resolve()
            if path and not there.exists():
                found.append(f"{page}: {target}")
            elif anchor and anchor not in anchors(there.read_text() if path else text):
                found.append(f"{page}: {target}: no such heading")
    return found


def missing_files(pages: dict[str, str]) -> list[str]:
    """Paths in backticks that begin with a folder of the repository and do not exist."""
    found = []
    for page, text in pages.items():
        for word in inline(text):
            path = re.match(rf"(\./)?((?:{FOLDERS})/[\w./*-]*)", word)
            if path and not list(ROOT.glob(path[2].rstrip("/"))):
                found.append(f"{page}: {word}")
            if re.fullmatch(r"test_\w+\.py", word) and not list(ROOT.glob(f"tests/**/{word}")):
                found.append(f"{page}: {word}")
    return found


def unknown_commands(pages: dict[str, str]) -> list[str]:
    """Each `gpt-jax NAME` or `launch/local.sh NAME` that is no command or engine."""
    found = []
    for page, text in pages.items():
        code = "\n".join([blocks(text), *inline(text)])
        named = re.findall(r"(?:gpt-jax|local\.sh)[ ]+([a-z]\w*)(?: ([a-z]\w*))?", code)
        for name, more in named:
            if name not in main.COMMANDS:
                found.append(f"{page}: gpt-jax {name}")
            elif name == "launch" and more and more not in launch.LAUNCHERS:
                found.append(f"{page}: gpt-jax launch {more}")
    return found


@functools.cache
def known_flags() -> set[str]:
    """Every flag that the program or a launcher spells, and those made from fields of Sampling."""
    sources = [*ROOT.glob("gpt_jax/**/*.py"), *ROOT.glob("launch/*.sh")]
    found = {flag for path in sources for flag in re.findall(r"--[a-z]\w*", path.read_text())}
    sampling = (ROOT / "gpt_jax/infer/sampling.py").read_text()
    return found | {f"--{name}" for name in re.findall(r"^    (\w+): ", sampling, re.MULTILINE)}


def unknown_flags(pages: dict[str, str]) -> list[str]:
    """Flags on lines that call gpt-jax or a launcher, if none of them has such a flag."""
    found = []
    for page, text in pages.items():
        for line in [*blocks(text).splitlines(), *inline(text)]:
            if not re.match(r"\s*(gpt-jax|\S*launch/\w+\.sh)\b", line):
                continue
            line = line.split("#")[0].split(" -- .venv")[0].split(" -- sinfo")[0]
            flags = re.findall(r"(?<!\S)(--[a-z]\w*)(?!\.)\b", line)
            found += [
                f"{page}: {flag}" for flag in flags if flag not in known_flags() | {"--config"}
            ]
    return found


def wrong_old_names(pages: dict[str, str]) -> list[str]:
    """Rows in which the table of renamed keys differs from the program's own."""
    text = pages.get("docs/overriding.md", "").partition("## Old names")[2]
    if not text:
        return []
    told = dict(re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", text, re.MULTILINE))
    wrong = told.items() ^ RENAMED.items()
    return sorted(f"{old} -> {new}" for old, new in wrong)


def config_key(section: str, name: str) -> bool:
    kind = SECTIONS.get(section)
    return dataclasses.is_dataclass(kind) and name in fields_of(kind)


def unknown_keys(pages: dict[str, str]) -> list[str]:
    """Config keys that are no fields: `config.a.b`, and in the prose `a.b` of a section a."""
    found = []
    for page, text in pages.items():
        full = re.findall(r"config\.([a-z]\w*)\.([a-z]\w*)", blocks(text) + "\n".join(inline(text)))
        words = [re.fullmatch(r"([a-z]\w*)\.([a-z]\w*)( = .*|=.*)?", word) for word in inline(text)]
        short = [(word[1], word[2]) for word in words if word and word[1] in SECTIONS]
        for section, name in [*full, *short]:
            known = config_key(section, name) or name in FILE_ENDINGS
            if not known and f"| `{section}.{name}` |" not in text:  # the table of old names
                found.append(f"{page}: config.{section}.{name}")
    return found


@functools.cache
def program_texts() -> str:
    """All texts of the program, a line each, without what an f-string fills in."""
    texts = []

    for path in ROOT.glob("gpt_jax/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                ]
                texts.append("".join(parts))
    texts += [path.read_text() for path in ROOT.glob("launch/*.sh")]
    return "\n".join(texts)


def unknown_messages(pages: dict[str, str]) -> list[str]:
    """Quoted messages, bold and in backticks, that no text of the program has.

    … stands for what differs from case to case.
    """
    found = []
    for page, text in pages.items():
        if page.endswith("troubleshooting.md"):
            for message in re.findall(r"\*\*`(.+?)`\*\*", text):
                parts = [part.strip(" ;:") for part in message.split("…")]
                found += [f"{page}: {part}" for part in parts if part not in program_texts()]
    return found


def wrong_map(pages: dict[str, str]) -> list[str]:
    """Modules that the map of the house names and that do not exist, or the other way round."""
    if "docs/architecture.md" not in pages:
        return []
    rows = re.findall(
        r"^\| `(gpt_jax/[\w/]*)` \| ([\w ]+) \|", pages["docs/architecture.md"], re.MULTILINE
    )
    drawn = {f"{room}{name}.py" for room, names in rows for name in names.split()}
    there = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("gpt_jax/**/*.py")}
    there = {path for path in there if not path.endswith(("__init__.py", "__main__.py"))}
    return [f"not there: {path}" for path in sorted(drawn - there)] + [
        f"not on the map: {path}" for path in sorted(there - drawn)
    ]


def missing_tables(pages: dict[str, str]) -> list[str]:
    """Rows `to add | file | TABLE | test` whose table no file of the row defines."""
    found = []
    for page, text in pages.items():
        for files, tables in re.findall(r"^\| [\w ]+ \| ([^|]*) \| ([^|]*) \|", text, re.MULTILINE):
            paths = re.findall(r"gpt_jax/[\w/]+\.py", files + tables)
            sources = "\n".join(read_if_there(path) for path in paths)
            for name in re.findall(r"`([A-Z_]+)`", tables):
                if not re.search(rf"^{name}\b.*=", sources, re.MULTILINE):
                    found.append(f"{page}: {name} is not in {files}")
    return found


def read_if_there(path: str) -> str:
    return (ROOT / path).read_text() if (ROOT / path).is_file() else ""


@functools.cache
def source_words() -> set[str]:
    paths = [
        path
        for folder in ("gpt_jax", "configs", "launch", "tests", "examples")
        for path in (ROOT / folder).rglob("*")
    ]
    texts = [path.read_text() for path in paths if path.suffix in (".py", ".pyi", ".sh")]
    return set(re.findall(r"\w+", "\n".join(texts)))


INVENTED = {"mymodule", "dcn_x", "LICENSE"}


def unknown_names(pages: dict[str, str]) -> list[str]:
    """Identifiers in the prose, dotted and called too, that no source file has."""
    found = []
    for page, text in pages.items():
        for word in inline(text):
            if name := re.fullmatch(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(\(.*\))?", word):
                parts = [] if word.endswith(".py") else name[1].split(".")
                unknown = set(parts) - source_words() - INVENTED
                found += [f"{page}: {part}" for part in sorted(unknown)]
    return found


def broken_shell(pages: dict[str, str]) -> list[str]:
    """Blocks of sh or bash that bash cannot parse."""
    found = []
    for page, text in pages.items():
        pattern = r"^ *```(?:sh|bash)\n(.*?)^ *```"
        for block in re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE):
            bash = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
            if bash.returncode:
                found.append(f"{page}: {block.splitlines()[0]}")
    return found


def too_long(pages: dict[str, str]) -> list[str]:
    lines = pages.get("README.md", "").count("\n")
    return [f"README.md: {lines} lines"] if lines > README_LINES else []


RULES = [
    broken_links,
    missing_files,
    unknown_commands,
    unknown_flags,
    unknown_keys,
    wrong_old_names,
    unknown_messages,
    wrong_map,
    missing_tables,
    unknown_names,
    broken_shell,
    too_long,
]


@pytest.mark.parametrize("rule", RULES)
def test_pages(rule):
    assert rule(read_pages()) == []


@pytest.mark.parametrize(
    "rule, page, text, wanted",
    [
        (
            broken_links,
            "docs/a.md",
            "[x](nothing.md) [y](../README.md) [z](#here)\n# Here",
            ["docs/a.md: nothing.md"],
        ),
        (
            broken_links,
            "README.md",
            "[x](docs/data.md#nowhere)",
            ["README.md: docs/data.md#nowhere: no such heading"],
        ),
        (
            missing_files,
            "README.md",
            "`gpt_jax/none.py` `configs/*.py` `./launch/local.sh` `x` `test_docs.py` `test_no.py`",
            ["README.md: gpt_jax/none.py", "README.md: test_no.py"],
        ),
        (
            unknown_commands,
            "a.md",
            "`gpt-jax fly`\n```\n./launch/local.sh walk --x\n```",
            ["a.md: gpt-jax walk", "a.md: gpt-jax fly"],
        ),
        (unknown_commands, "a.md", "`gpt-jax launch rocket`", ["a.md: gpt-jax launch rocket"]),
        (
            unknown_flags,
            "a.md",
            "```sh\ngpt-jax train --config=x \\\n    --wings=2\n```",
            ["a.md: --wings"],
        ),
        (
            unknown_keys,
            "a.md",
            "`--config.model.layers=1` `config.model.wings` `train.speed` `train.bin`",
            ["a.md: config.model.wings", "a.md: config.train.speed"],
        ),
        (
            unknown_messages,
            "docs/troubleshooting.md",
            "**`no such wing`** **`… no such file or directory`**",
            ["docs/troubleshooting.md: no such wing"],
        ),
        (
            missing_tables,
            "a.md",
            "| wing | `gpt_jax/config/knobs.py` | `WINGS` | x |\n"
            "| norm | `gpt_jax/config/knobs.py` | `NORMS` | x |",
            ["a.md: WINGS is not in `gpt_jax/config/knobs.py`"],
        ),
        (
            unknown_names,
            "a.md",
            "`Config` `config.model` `test_docs.py` `config.no_such" + "_wing(x)`",
            ["a.md: no_such" + "_wing"],
        ),
        (
            broken_shell,
            "a.md",
            "```sh\nls --x=() y\n```\n```bash\nls '--x=()'\n```\n```\nf(\n```",
            ["a.md: ls --x=() y"],
        ),
        (too_long, "README.md", "\n" * 201, ["README.md: 201 lines"]),
    ],
)
def test_rules_can_fail(rule, page, text, wanted):
    assert rule({page: text}) == wanted


def test_the_table_of_old_names_can_fail():
    page = "## Old names\n| `data.wings` | `data.packing` |"
    assert "data.wings -> data.packing" in wrong_old_names({"docs/overriding.md": page})
    assert "data.rows -> data.packing" in wrong_old_names({"docs/overriding.md": page})


def test_the_map_can_fail():
    drawn = read_pages()["docs/architecture.md"]
    assert "not there: gpt_jax/config/wings.py" in wrong_map(
        {"docs/architecture.md": drawn.replace("fields ", "wings ")}
    )
    assert "not on the map: gpt_jax/config/fields.py" in wrong_map(
        {"docs/architecture.md": drawn.replace("fields ", "")}
    )


def test_every_page_is_in_the_navigation():
    listed = re.findall(
        r"[\w-]+\.md", yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    )
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
