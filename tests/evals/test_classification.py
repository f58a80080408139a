"""What is measured of a classification, against values computed by hand."""

import math

import jax
import numpy as np
import pytest
import subjects

from gpt_jax.data import Classify
from gpt_jax.evals import make_classification_page, measure_classification, tabulate_confusion
from gpt_jax.evals.classification import find_calibration_error, find_macro_f1
from gpt_jax.infer import classify_prompts, encode_labels, score_labels

GOLD = np.array([0, 0, 1, 1, 2])
CHOSEN = np.array([0, 1, 1, 1, 0])
CONFIDENCE = np.array([0.9, 0.5, 0.9, 0.9, 0.5])
LABELS = ("a", "b<c", "d", "never")


def test_values_by_hand():
    measured = measure_classification(LABELS, GOLD, CHOSEN, CONFIDENCE)
    assert measured.values["accuracy"] == 3 / 5
    # F1 of a is 2 * 1 / (2 + 2), of b<c 2 * 2 / (2 + 3), and of d 0. The last label never occurs.
    assert measured.values["macro_f1"] == pytest.approx((0.5 + 0.8 + 0) / 3)
    # Three right ones at 0.9, and two wrong ones at 0.5.
    assert measured.values["ece"] == pytest.approx((3 * 0.1 + 2 * 0.5) / 5)
    wanted = [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert measured.confusion.tolist() == wanted
    assert tabulate_confusion(measured)[:2] == [
        ("label \\ chosen", *LABELS),
        ("a", "1", "1", "0", "0"),
    ]
    page = make_classification_page(measured, "title", "about")
    assert "0.6000" in page and "b&lt;c" in page and "b<c" not in page
    assert measured.to_json()["confusion"] == wanted


def test_bins_of_calibration():
    """Confidences of one bin cancel out, and those of several do not. 1 is in the last bin."""
    confidence, right = np.array([1.0, 1.0, 0.5, 0.52]), np.array([1.0, 0.0, 1.0, 0.0])
    assert find_calibration_error(confidence, right) == pytest.approx((1 + 0.02) / 4)
    assert find_calibration_error(np.array([0.4, 0.6]), np.array([1.0, 0.0])) == pytest.approx(0.6)
    assert math.isnan(find_macro_f1(np.zeros((2, 2), int)))


def test_intervals_of_resampled_rows():
    rows = 400
    gold = np.zeros(rows, int)
    chosen = (np.arange(rows) % 10 < 3).astype(int)
    measured = measure_classification(("a", "b"), gold, chosen, np.full(rows, 0.7))
    low, high = measured.intervals["accuracy"]
    # The interval of a rate by the normal distribution.
    half = 1.96 * math.sqrt(0.7 * 0.3 / rows)
    assert (low, high) == pytest.approx((0.7 - half, 0.7 + half), abs=0.01)
    again = measure_classification(("a", "b"), gold, chosen, np.full(rows, 0.7))
    assert again.intervals == measured.intervals


def test_rows_without_a_probability_are_counted():
    confidence = np.where(np.arange(5) == 4, np.nan, CONFIDENCE)
    measured = measure_classification(LABELS, GOLD, CHOSEN, confidence)
    assert (measured.rows, measured.not_finite, measured.values["accuracy"]) == (4, 1, 3 / 4)
    nothing = measure_classification(LABELS, GOLD, CHOSEN, np.full(5, np.nan))
    assert nothing.to_json()["accuracy"] is None and nothing.rows == 0


def test_labels_are_scored_as_they_were_learned():
    """By the table of a bigram model: the words after the prompt's last byte, and then the end."""
    table = subjects.draw_table()
    subject = subjects.make_subject(table)
    # The words of one label begin those of the other, so the end of text decides.
    options = Classify(prompt="{text}=", labels=(("0", "no"), ("1", "not ")))
    prompts = ["ab=", "a much longer text, with the same end="]
    about = subject.model, subject.compute, subject.params, subject.tokenizer
    found = classify_prompts(*about, prompts, options, print)

    def score(words):
        ids = [ord("="), *words.encode(), subjects.IDS - 1]
        return float(np.log(table[ids[:-1], ids[1:]]).sum())

    odds = math.exp(score("not ") - score("no"))
    for one in found:
        assert one.probabilities["1"] == pytest.approx(odds / (1 + odds), rel=1e-4)
        assert one.label == ("1" if odds > 1 else "0")
    labels = encode_labels(subject.tokenizer, options)
    assert [row.tolist() for row in labels] == [[*b"no", 256], [*b"not ", 256]]

    broken = jax.tree.map(lambda leaf: leaf * np.nan, subject.params)
    ids = subject.tokenizer.encode_batch(prompts)
    assert np.isnan(score_labels(*about[:2], broken, ids, labels, print)).all()
