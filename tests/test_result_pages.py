"""Pages with figures say what the JSON files of the benchmarks say."""

import runpy

import pytest
import runs

CARDS = runpy.run_path(str(runs.ROOT / "benchmarks/cards.py"))
RESULTS = runpy.run_path(str(runs.ROOT / "benchmarks/result_tables.py"))


@pytest.mark.parametrize("heading", RESULTS["TABLES"])
def test_tables_of_results(heading):
    page = RESULTS["PAGE"].read_text()
    start, end = RESULTS["find_table"](page, heading)
    assert page[start:end] == RESULTS["TABLES"][heading]()


def test_pages_of_cards():
    pages = CARDS["make_pages"]()
    for path, text in pages.items():
        assert path.read_text() == text, path
    cards = {path for path in pages if path.parent == CARDS["PAGES"]}
    assert set(CARDS["PAGES"].iterdir()) == cards


def test_cards_are_of_shipped_rows():
    assert set(CARDS["read_cards"]()) <= set(CARDS["ROWS"])
