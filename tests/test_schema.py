"""A value fits a schema or the first place where it does not is named."""

import json

import pytest

from gpt_jax.schema import Each, Misfit, find_misfit, read_json

SCHEMA = {
    "name": "text",
    "size": "count",
    "kind": {"a", "b"},
    "files": Each(("count", "text")),
    "rows": ["flag"],
    "more?": {"rate": "number"},
}
GOOD = {
    "name": "x",
    "size": 0,
    "kind": "a",
    "files": {"f.bin": [3, "ab"], "?": [0, ""]},
    "rows": [True, False],
    "other": [1, {"deep": None}],
}


def test_what_fits_comes_back():
    assert read_json(json.dumps(GOOD), SCHEMA) == GOOD
    assert read_json(json.dumps(GOOD | {"more": {"rate": 1}}).encode(), SCHEMA)["more"] == {
        "rate": 1
    }
    assert read_json("Infinity", "number") == float("inf")
    assert read_json("[]", ["count"]) == [] and read_json("{}", Each("count")) == {}


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"name": 1}, "name: expected a text, got 1"),
        ({"name": None}, "name: expected a text, got null"),
        ({"size": -1}, "size: expected a count, got -1"),
        ({"size": True}, "size: expected a count, got true"),
        ({"size": 1.0}, "size: expected a count, got 1.0"),
        ({"size": 2**63}, "size: expected a count"),
        ({"kind": "c"}, 'kind: expected one of a, b, got "c"'),
        ({"kind": ["a"]}, "kind: expected one of a, b, got a list"),
        ({"files": []}, "files: expected an object, got a list"),
        ({"files": {"f.bin": [1]}}, "files.'f.bin': expected a list of 2 entries, got a list"),
        ({"files": {"f.bin": [1, 2]}}, "files.'f.bin'[1]: expected a text, got 2"),
        ({"rows": [True, 0]}, "rows[1]: expected a flag, got 0"),
        ({"more": {}}, "more.rate: missing"),
        ({"more": {"rate": 10**400}}, "more.rate: expected a number"),
    ],
)
def test_what_does_not_fit_is_named(changes, problem):
    assert find_misfit(GOOD | changes, SCHEMA).startswith(problem)
    with pytest.raises(Misfit):
        read_json(json.dumps(GOOD | changes), SCHEMA)


def test_a_missing_field_is_named():
    assert find_misfit({name: GOOD[name] for name in GOOD if name != "size"}, SCHEMA) == (
        "size: missing"
    )


@pytest.mark.parametrize("text", ["", "{", "[" * 200_000, b"\xff\xfe\xfd", "9" * 5000, "nul"])
def test_what_is_no_json_is_a_misfit(text):
    with pytest.raises(Misfit):
        read_json(text, "object")
