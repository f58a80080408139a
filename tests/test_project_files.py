"""What stands in two files of the project is the same in both."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


def pinned_ruff(text: str) -> set[str]:
    """The versions of ruff that a file asks for."""
    return set(re.findall(r"\bruff==([\w.]+)", text))


def test_hooks_and_environments_have_one_ruff():
    """A hook of another version would format what check.sh then refuses."""
    files = [ROOT / ".pre-commit-config.yaml", *ROOT.glob("launch/constraints-*.txt")]
    found = {path.name: pinned_ruff(path.read_text()) for path in files}
    assert len(found) > 1
    assert len(set().union(*found.values())) == 1, found
    assert all(found.values()), found


def test_one_version():
    """pyproject, the citation and the changelog speak of one version."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_names_of_test_files_differ():
    """pytest imports them by name, so two of one name end a run that has both."""
    names = [path.name for path in ROOT.glob("tests/**/*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
