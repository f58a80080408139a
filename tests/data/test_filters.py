"""Filters and duplicates.

Each row of the table, mistakes in specs, and MinHash against exact similarity.
"""

import pickle
import random
import sys
import unicodedata

import numpy as np
import pytest

from gpt_jax.data.prepare import duplicates, filters
from gpt_jax.data.prepare.duplicates import UNITS, find_near_duplicates, minhash
from gpt_jax.data.prepare.filters import parse_filters
from gpt_jax.errors import UsageError
from gpt_jax.files import digest_json

ENGLISH = (
    "The committee will meet again on Thursday to decide whether the bridge should be closed for "
    "repairs."
)
CHINESE = "委员会将于星期四再次开会，决定是否关闭这座桥进行维修。"

ROWS = [  # spec, {text: what becomes of it}
    ("min_chars:3", {"ab": None, "abc": "abc"}),
    ("max_chars:3", {"abcd": None, "abc": "abc"}),
    ("min_bytes:4", {"中": None, "中x": "中x"}),
    ("max_bytes:3", {"中": "中", "中x": None}),
    ("min_letters:0.5", {"ab12": "ab12", "a123": None, "中文12": "中文12"}),
    ("max_repeated:0.5", {"a\na": "a\na", "a\na\na": None, "\n": None, "a\nb\n\n\n": "a\nb\n\n\n"}),
    ("language:en", {ENGLISH: ENGLISH, CHINESE: None}),
    ("language:zh+ja", {ENGLISH: None, CHINESE: CHINESE}),
    ("language:zh,en:0.9", {ENGLISH: ENGLISH, "12 34": None}),
    ("language:en:0.99", {"hello there, how are you today?": None}),
    ("normalize:NFC", {"e\u0301": "\u00e9"}),
    ("normalize:NFKC", {"ｆｕｌｌ": "full"}),
    ("strip", {" a \n": "a", " \n": None}),
    ("newlines", {"a\r\nb\rc\n": "a\nb\nc\n"}),
    ("controls", {"a\x00\x07b\tc\r\n": "ab\tc\r\n", "\x01": None}),
    ("blank_lines", {"a\n\n\n\nb\n\nc": "a\n\nb\n\nc"}),
    (r"replace:/\d+/#/", {"a 12 b 3": "a # b #"}),
    ("replace:|https?://[^ ]+||", {"See https://example.org/a for more": "See  for more"}),
    (r"replace:,(\w+)://(\w+),\2:\1,", {"at http://host:80": "at host:http:80"}),
]


@pytest.mark.parametrize("spec, cases", ROWS, ids=[spec for spec, _ in ROWS])
def test_each_filter(spec, cases):
    chain = parse_filters((spec,))
    for text, wanted in cases.items():
        if wanted == text and text.isspace():
            continue
        assert chain(text) == ((wanted, "") if wanted else (None, spec)), text


def test_every_row_of_the_table_is_tested():
    assert {spec.split(":")[0] for spec, _ in ROWS} == set(filters.FILTERS)
    assert all(row.usage.split(":")[0] == name for name, row in filters.FILTERS.items())


def test_chain_order_and_pickle():
    chain = pickle.loads(
        pickle.dumps(parse_filters(("strip", "min_chars:2", "normalize:NFC", "max_chars:3")))
    )
    assert chain("  e\u0301a ") == ("éa", "")
    assert chain("  a  ") == (None, "min_chars:2") and chain("abcd") == (None, "max_chars:3")
    assert parse_filters(())("x") == ("x", "")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("max_chars:-5", r"--filters='max_chars:-5': expected max_chars:N \(-5 is not from 0"),
        (
            "min_char:3",
            "--filters='min_char:3': no such filter; there are min_chars:N max_chars:N .* "
            "module:function",
        ),
        ("nothing", "no such filter"),
        ("", "no such filter"),
        ("min_chars", "expected min_chars:N$"),
        ("min_chars:x", "expected min_chars:N .*'x'"),
        ("strip:1", "expected strip"),
        ("min_letters:2", "expected min_letters:PART .2 is not from 0 to 1"),
        ("normalize:X", "expected normalize:NFC"),
        ("language:english", "english unknown; known are .* en .* zh"),
        ("replace:/[//", "not a regular expression"),
        (r"replace:/a/\1/", "not a regular expression"),
        ("replace:https?://[^ ]+", r"expected replace:/REGEX/NEW/ \(one mark of .*https"),
        ("replace:a:b", "one mark of"),
        ("replace:/a/b", "one mark of"),
        ("replace:/a/b/c/", "one mark of"),
        ("replace:", "one mark of"),
        ("replace", "expected replace:/REGEX/NEW/$"),
        ("min_chars:3:4", "expected min_chars:N"),
        ("language:en:0.5:1", "expected language:zh,en"),
        (
            "no_such_module:f",
            "--filters='no_such_module:f': ModuleNotFoundError.*PYTHONPATH.*min_chars:N",
        ),
        ("json:no_function", "AttributeError.*no_function"),
    ],
)
def test_typed_wrong(spec, message):
    with pytest.raises(UsageError, match=message) as error:
        parse_filters((spec,))
    assert "\n" not in str(error.value)


def test_own_function(tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "def upper(text):\n    return text.upper() if text != 'no' else None\n"
        "def wrong(text):\n    return 7\n"
        "def broken(text):\n    return {}[text]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    chain = pickle.loads(pickle.dumps(parse_filters(("mine_for_test:upper",))))

    assert chain("yes") == ("YES", "") and chain("no") == (None, "mine_for_test:upper")
    with pytest.raises(UsageError, match="'mine_for_test:wrong': gave int, expected text or None"):
        parse_filters(("mine_for_test:wrong",))("x")
    with pytest.raises(UsageError, match="'mine_for_test:broken': raised KeyError: 'x'"):
        parse_filters(("mine_for_test:broken",))("x")


def test_code_of_own_functions(tmp_path, monkeypatch):
    """It is that of the named module and of the module of its function, and no other."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "written_for_test.py").write_text("def same(text):\n    return text\n")
    (tmp_path / "named_for_test.py").write_text("from written_for_test import same\n")
    specs = ("strip", "min_chars:3", "named_for_test:same")
    seen = set()
    for file in ("", "written_for_test.py", "named_for_test.py"):
        with open(tmp_path / (file or "other.py"), "a") as out:
            out.write("# edited\n")
        [(spec, found)] = filters.digest_code(specs).items()
        assert spec == specs[-1] and found == filters.digest_code(specs)[spec]
        seen.add(found)

    assert len(seen) == 3 and filters.digest_code(("strip", "builtins:str")) == {
        "builtins:str": digest_json([])
    }


@pytest.mark.parametrize(
    "package, use",
    [
        ("py3langid", lambda: parse_filters(("language:en",))),
        ("datasketch", lambda: minhash("a")),
    ],
)
def test_packages_that_are_not_there(monkeypatch, package, use):
    filters._load_identifier.cache_clear(), duplicates._blank_minhash.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"{package}; .* -m pip install .*'{package}'"):
        use()


# ---- duplicates ----


def shingles(text, size=5):
    """The sets of runs on which minhash estimates, in plain Python."""
    units = UNITS.findall(text.casefold()) or [text]
    return {tuple(units[i : i + size]) for i in range(max(len(units) - size, 0) + 1)}


def test_units():
    assert UNITS.findall("The CAT's, sat_1") == ["The", "CAT", "s", "sat_1"]
    assert UNITS.findall("GPT模型 x") == ["GPT", "模", "型", "x"] and UNITS.findall("ไทย") == list(
        "ไทย"
    )
    letters = [chr(c) for c in range(0x20, 0x30000) if unicodedata.category(chr(c)).startswith("L")]
    assert {"".join(UNITS.findall(c)) for c in letters} == set(letters)  # none is lost


@pytest.mark.parametrize(
    "text",
    ["", "...", "one", "a b c d e f", "a a a a a a a a", "我是一个程序员", CHINESE + ENGLISH],
)
def test_shingles_are_counted_as_spelt_out(text):
    hashes = [block.tolist() for block in duplicates._shingle_hashes(text, 5)]
    assert len({h for block in hashes for h in block}) == len(shingles(text))


def test_likeness_sees_past_case_and_punctuation():
    assert (minhash("The cat -- sat on a mat.") == minhash("the CAT sat, on a mat")).all()
    assert (minhash("a b c d e f") != minhash("f e d c b a")).mean() > 0.9


def test_minhash_does_not_depend_on_chunks(monkeypatch):
    text = " ".join(map(str, range(500)))
    signature = minhash(text)
    monkeypatch.setattr(duplicates, "SHINGLES_AT_ONCE", 7)

    assert (
        (minhash(text) == signature).all()
        and signature.dtype == np.uint32
        and signature.shape == (64,)
    )
    assert (
        minhash(text, 32).shape == (32,)
        and (minhash(text.replace("1", "2")) != signature).mean() > 0.5
    )


def jaccard(a, b):
    """The Jaccard similarity of two sets of shingles."""
    return len(a & b) / len(a | b)


def planted(count, seed=0):
    """Texts of random words. Each fourth is a copy of an earlier one with some words changed."""
    rng = random.Random(seed)
    texts = []
    for i in range(count):
        if i % 4 == 3:
            words = rng.choice(texts).split()
            for at in rng.sample(range(len(words)), rng.choice([0, 1, 2, 5, 20, 60])):
                words[at] = "changed"
        else:
            words = [f"w{rng.randrange(2000)}" for _ in range(300)]
        texts.append(" ".join(words))
    return texts


def test_similarity_is_estimated():
    texts = planted(40)
    pairs = [(i, j) for i in range(3, 40, 4) for j in range(i)]
    signatures = [minhash(text, 256) for text in texts]
    sets = [shingles(text) for text in texts]
    errors = np.array(
        [(signatures[i] == signatures[j]).mean() - jaccard(sets[i], sets[j]) for i, j in pairs]
    )
    assert np.abs(errors).max() < 5 / (2 * 256**0.5) and abs(errors.mean()) < 0.01


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_planted_duplicates_against_exact_similarity(threshold):
    texts = planted(240)
    sets = [shingles(text) for text in texts]
    signatures = np.stack([minhash(text, 128) for text in texts])
    found = find_near_duplicates(signatures, threshold)
    margin = 3 / (2 * 128**0.5)  # three standard errors
    best = [
        max([jaccard(sets[i], sets[j]) for j in range(i) if not found[j]], default=0)
        for i in range(len(texts))
    ]
    sure = [i for i, b in enumerate(best) if b >= min(threshold + margin, 1)]
    never = [i for i, b in enumerate(best) if b < threshold - margin]

    assert found[sure].all() and not found[never].any() and len(sure) >= 8 and len(never) > 150
    assert (find_near_duplicates(signatures, threshold) == found).all()


def all_pairs(signatures, threshold):
    """The same result by comparing every text with all that stay."""
    found = np.zeros(len(signatures), bool)
    for i in range(len(signatures)):
        found[i] = any(
            (signatures[i] == signatures[j]).mean() >= threshold for j in range(i) if not found[j]
        )
    return found


def test_rare_hashes_find_what_all_pairs_find():
    rng = np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (300, 64), np.uint64).astype(np.uint32)
    for i in range(1, 300, 2):  # like an earlier one in 64 to 32 places
        signatures[i, : 64 - i % 33] = signatures[rng.integers(i), : 64 - i % 33]
    for threshold in (0.6, 0.8, 1.0):
        found = find_near_duplicates(signatures, threshold)
        exact = all_pairs(signatures, threshold)
        assert exact.sum() >= 5 and (found == exact).all()
    copies = np.repeat(signatures[[0, 2, 4]], 4, 0)

    assert find_near_duplicates(copies).tolist() == [False, True, True, True] * 3
    assert (
        find_near_duplicates(signatures[:0]).shape == (0,)
        and not find_near_duplicates(signatures[:1]).any()
    )


def test_the_least_number_of_equal_hashes():
    for permutations, threshold in [(64, 0.8), (64, 0.5), (128, 0.95), (256, 0.3), (10, 0.7)]:
        least = duplicates.count_agreeing(permutations, threshold)
        assert (least - 1) / permutations < threshold <= least / permutations


def templated(count, shared, seed=0):
    """Signatures of texts of one template: `shared` of 64 hashes come from it, a part changed."""
    rng = np.random.default_rng(seed)
    template, *signatures = rng.integers(0, 2**32, (count + 1, 64), np.uint64).astype(np.uint32)
    for row in signatures:
        places = rng.permutation(64)[:shared]
        row[places] = template[places]
    return np.stack(signatures)


def count_compared(monkeypatch, signatures, threshold=0.8):
    """How many pairs are compared, and what is said."""
    sizes = []
    find = duplicates.Shelves.find

    def counting(self, shelves):
        near, has_more = find(self, shelves)
        sizes.append(len(near))
        return near, has_more

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(duplicates.Shelves, "find", counting)
        found = find_near_duplicates(signatures, threshold, lines.append)
    assert (found == all_pairs(signatures, threshold)).all()
    return sum(sizes), lines


def test_texts_of_one_template_are_not_all_compared(monkeypatch):
    """Similar by 0.56 on average, they are no copies at 0.8."""
    pairs, lines = count_compared(monkeypatch, templated(600, 48))
    assert pairs < 600 and lines == []


def test_what_almost_all_share_is_compared_a_bounded_number_of_times(monkeypatch):
    """Here even the rarest hashes are those of the template, and that is said."""
    monkeypatch.setattr(duplicates, "COMPARED", 5)
    pairs, lines = count_compared(monkeypatch, templated(300, 54))
    assert 300 < pairs < 300 * 5 * 4  # of 45,000
    assert len(lines) == 1 and "compared with the last 5" in lines[0]


def test_a_chain_of_likenesses_keeps_one_that_is_like_what_goes():
    """B is like A, and C is like B but not like A.

    C stays, because B goes and cannot stand for it.
    """
    a = np.arange(100, dtype=np.uint32)
    b = a.copy()
    c = a.copy()
    b[:15], c[:30] = 1000 + a[:15], 1000 + a[:30]
    c[:15] = b[:15]
    assert find_near_duplicates(np.stack([a, b, c]), 0.8).tolist() == [False, True, False]


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_threshold(threshold):
    with pytest.raises(UsageError, match="threshold = "):
        find_near_duplicates(np.zeros((2, 64), np.uint32), threshold)
