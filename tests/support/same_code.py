"""Whether files do what they did at an earlier commit: their syntax trees, prose left out.

    python tests/support/same_code.py REVISION [PATH ...]            # after rewording or formatting
    python tests/support/same_code.py REVISION PATH --strings        # messages may differ too

Docstrings, comments and layout are no part of a tree, so a pass over prose leaves it equal. With
`--strings` every string counts as the same; read those changes in the diff. Prints the files that
differ. Exit code 0: none does, 1: some do.
"""

import argparse
import ast
import subprocess
import sys
from pathlib import Path


class WithoutProse(ast.NodeTransformer):
    """Takes docstrings and `pass` out of a tree; with `strings` the text of all strings too."""

    def __init__(self, strings: bool):
        self.strings = strings

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Cleans what stands below a node."""
        super().generic_visit(node)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node, clean=False) is not None
            statements = node.body[1:] if has_docstring else node.body
            node.body = [each for each in statements if not isinstance(each, ast.Pass)]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        """Gives all strings one text if they may differ."""
        if self.strings and isinstance(node.value, str) and node.value:
            return ast.Constant("text")
        return node


def meaning(text: str, strings: bool = False) -> str:
    """What two texts of Python must share to do the same."""
    return ast.dump(WithoutProse(strings).visit(ast.parse(text)))


def git(*arguments: str) -> str:
    """The output of git. Raises CalledProcessError if it fails."""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout


def changed_files(revision: str, paths: list[str]) -> list[str]:
    """Tracked Python files that differ from those at `revision`, by their paths from the root."""
    names = git("diff", "--name-only", "--no-renames", revision, "--", *paths).split("\n")
    return [path for path in names if path.endswith(".py")]


def text_at(revision: str, path: str) -> str:
    """A file at an earlier commit, or "" if it was not there."""
    there = git("ls-tree", "--full-tree", revision, path)
    return git("show", f"{revision}:{path}") if there else ""


def main() -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("revision")
    flags.add_argument("paths", nargs="*")
    flags.add_argument("--strings", action="store_true", help="strings may differ")
    args = flags.parse_args()

    root = Path(git("rev-parse", "--show-toplevel").strip())
    files = changed_files(args.revision, args.paths)
    differing = []
    for name in files:
        path = root / name
        now = path.read_text() if path.exists() else ""
        before = text_at(args.revision, name)
        if meaning(before, args.strings) != meaning(now, args.strings):
            differing.append(name)

    for name in differing:
        print(f"differs: {name}")
    print(f"{len(files) - len(differing)} of {len(files)} changed files do what they did")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
