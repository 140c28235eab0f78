"""What a study's rows say: accuracy with intervals, answers to questions, and rows that cannot be compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recipe.detectable import detectable_difference, variance_components
from recipe.intervals import over_seeds, over_seeds_and_items
from recipe.paired import MethodRuns, compare
from recipe.study_accuracy import Refused, entry_accuracy
from recipe.study_answers import answer
from recipe.study_file import Study, parse_study
from recipe.study_items import pack_items, write_questions
from verl_ext.config import ConfigError

K, P, SEEDS = 8, 30, 4


def declared(**question: Any) -> Study:
    asked = {"ask": "better?", "first": "new", "second": "old", **question}
    grid = [{"name": "new", "overrides": ["method=sdpo"]}, {"name": "old", "overrides": ["method=grpo"]}]
    return parse_study({"name": "s", "seeds": list(range(SEEDS)), "grid": grid, "questions": [asked]}, "study.yaml")


def counts_SP(gain: float, seed: int = 0) -> np.ndarray:
    """Right answers of K for each seed and question."""
    rng = np.random.default_rng(seed)
    rate_P = rng.uniform(0.2, 0.6, P)
    return rng.binomial(K, rate_P + gain, (SEEDS, P))


def row(run_id: str, seed: int, right_by_step: Mapping[int, Any], k: int = K, *, items: bool = True) -> dict[str, Any]:
    validations = [
        {"step": step, "samples": k, "items": [f"q{i}" for i in range(len(right))], "right": list(map(int, right)),
         "judged": [k] * len(right)}
        for step, right in right_by_step.items()
    ]  # fmt: skip
    curve = {
        str(step): {f"mean@{k}": float(np.mean(right) / k), f"maj@{k}": float(np.mean(np.asarray(right) > k / 2))}
        for step, right in right_by_step.items()
    }
    made = {"run_id": run_id, "seed": seed, "curve": curve, "summary": {"metric": f"val/mean@{k}"}}
    return {**made, "items": pack_items(validations)} if items else made


def rows_of(study: Study, new_SP: np.ndarray, old_SP: np.ndarray, **settings: Any) -> dict[str, dict[str, Any]]:
    values = {"new": new_SP, "old": old_SP}
    return {
        run.run_id: row(run.run_id, run.seed, {0: counts_SP(0)[0], 40: values[run.entry][run.seed]}, **settings)
        for run in study.runs
    }


def asked(study: Study, rows: Mapping[str, Any], folder: Path) -> Any:
    return answer(study, rows, study.questions[0], folder)


def test_an_entry_s_accuracy_is_the_matrix_of_its_runs(tmp_path: Path) -> None:
    study, new_SP = declared(), counts_SP(0.2)
    found = entry_accuracy(study, rows_of(study, new_SP, counts_SP(0)), "new", tmp_path)
    assert np.allclose(found.accuracy_SP, new_SP / K, atol=1e-15)
    assert (found.metric, found.step, found.seeds, found.samples) == ("mean@8", 40, (0, 1, 2, 3), 8)
    assert found.interval("seeds and items") == over_seeds_and_items(new_SP / K)
    assert entry_accuracy(study, {}, "new", tmp_path) is None
    first = entry_accuracy(study, rows_of(study, new_SP, counts_SP(0)), "new", tmp_path, step=0)
    assert np.allclose(first.accuracy_SP, counts_SP(0)[0] / K)


def test_the_names_of_the_questions_come_from_the_file_beside_the_rows(tmp_path: Path) -> None:
    study = declared()
    rows = rows_of(study, counts_SP(0.2), counts_SP(0))
    assert entry_accuracy(study, rows, "new", tmp_path).items[1].startswith("question 1 of ")
    write_questions(tmp_path, [f"q{i}" for i in range(P)])
    assert entry_accuracy(study, rows, "new", tmp_path).items[1] == "q1"


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_an_answer_is_the_comparison_over_seeds_and_items(pairing: str, tmp_path: Path) -> None:
    study, new_SP, old_SP = declared(pairing=pairing, delta=0.01), counts_SP(0.3, 1), counts_SP(0, 2)
    found = asked(study, rows_of(study, new_SP, old_SP), tmp_path)
    names, seeds = range(P), range(SEEDS)
    expected = compare(
        MethodRuns("new", new_SP / K, names, K, seeds),
        MethodRuns("old", old_SP / K, names, K, seeds),
        delta=0.01,
        pairing=pairing,
    )
    assert found.verdict == "yes" == expected.verdict and found.seeds == (0, 1, 2, 3) and found.metric == "mean@8"
    assert found.comparison.difference == expected.difference
    assert (found.comparison.p_seeds, found.comparison.p_items) == (expected.p_seeds, expected.p_items)
    components = variance_components((new_SP - old_SP) / K)
    assert found.blind_below == detectable_difference(components, SEEDS, P, pairing=pairing)
    assert not found.note


def test_the_other_direction_is_no_and_equal_methods_are_not_resolved(tmp_path: Path) -> None:
    study = declared()
    assert asked(study, rows_of(study, counts_SP(0), counts_SP(0.3)), tmp_path).verdict == "no"
    assert asked(study, rows_of(study, counts_SP(0, 5), counts_SP(0, 6)), tmp_path).verdict == "not resolved"


def test_only_seeds_that_both_have_are_paired(tmp_path: Path) -> None:
    study = declared()
    rows = rows_of(study, counts_SP(0.3), counts_SP(0))
    gone = {run.run_id for run in study.runs if (run.entry, run.seed) in {("new", 0), ("old", 3)}}
    found = asked(study, {name: one for name, one in rows.items() if name not in gone}, tmp_path)
    assert found.seeds == (1, 2) and found.comparison.difference.n_seeds == 2
    alone = {run.run_id: rows[run.run_id] for run in study.runs if (run.entry, run.seed) in {("new", 0), ("old", 1)}}
    assert asked(study, alone, tmp_path).note == "the entries have no finished seed in common"


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    study = declared()
    rows = rows_of(study, counts_SP(0.3), counts_SP(0))
    found = asked(study, {run.run_id: rows[run.run_id] for run in study.runs if run.entry == "new"}, tmp_path)
    assert (found.verdict, found.note, found.comparison) == ("not run", "no finished run of old", None)


def test_a_single_seed_resolves_nothing_however_large_the_difference(tmp_path: Path) -> None:
    study = declared()
    rows = rows_of(study, counts_SP(0.35), counts_SP(0))
    one = {run.run_id: rows[run.run_id] for run in study.runs if run.seed == 0}
    found = asked(study, one, tmp_path)
    assert found.comparison.difference.population == "items" and found.comparison.difference.low > 0
    assert found.verdict == "not resolved" and "not about the methods" in found.note and found.blind_below is None


def test_rows_without_counts_speak_about_seeds_on_these_questions(tmp_path: Path) -> None:
    study, new_SP, old_SP = declared(), counts_SP(0.3), counts_SP(0)
    rows = rows_of(study, new_SP, old_SP, items=False)
    found = asked(study, rows, tmp_path)
    means_S = (new_SP - old_SP).mean(axis=1) / K
    assert found.comparison.difference.population == "seeds" and found.verdict == "yes"
    assert found.comparison.difference.value == pytest.approx(means_S.mean())
    # Half-width of the plain t interval over the seeds' differences, 3 degrees of freedom.
    half = 3.182446305284263 * means_S.std(ddof=1) / 2
    assert found.comparison.difference.low == pytest.approx(means_S.mean() - half)
    assert "taken from the declaration" in found.note and found.comparison.p_items is None
    # One side with counts and the other without: the same.
    mixed = rows_of(study, new_SP, old_SP)
    mixed |= {run.run_id: rows[run.run_id] for run in study.runs if run.entry == "old"}
    assert asked(study, mixed, tmp_path).comparison.difference == found.comparison.difference


def test_the_majority_is_compared_over_seeds(tmp_path: Path) -> None:
    study, new_SP = declared(metric="maj"), counts_SP(0.3)
    rows = rows_of(study, new_SP, counts_SP(0))
    found = asked(study, rows, tmp_path)
    assert found.metric == "maj@8" and found.comparison.difference.population == "seeds" and not found.note
    accuracy = entry_accuracy(study, rows, "new", tmp_path, metric="maj")
    assert accuracy.interval("seeds") == over_seeds((new_SP > K / 2).mean(axis=1, keepdims=True))


def test_pass_at_k_is_compared_by_question_and_k_must_not_exceed_the_samples(tmp_path: Path) -> None:
    rows = rows_of(declared(), counts_SP(0.3), counts_SP(0))
    found = asked(declared(metric="pass@8"), rows, tmp_path)
    expected = (counts_SP(0.3) > 0).mean() - (counts_SP(0) > 0).mean()
    assert found.metric == "pass@8" and found.comparison.difference.value == pytest.approx(expected)
    refused = asked(declared(metric="pass@9"), rows, tmp_path)
    assert refused.verdict == "refused" and refused.comparison is None
    assert refused.note.endswith("pass@9 needs at least 9 samples, found 8") and refused.note.startswith(
        "run new-seed0"
    )
    bare = rows_of(declared(), counts_SP(0.3), counts_SP(0), items=False)
    assert (
        "has no pass@9 at step 40; its validation has 8 samples"
        in asked(declared(metric="pass@9"), bare, tmp_path).note
    )


def change(rows: dict[str, Any], run_id: str, made: dict[str, Any]) -> dict[str, Any]:
    return {**copy.deepcopy(rows), run_id: made}


def test_runs_that_cannot_be_compared_are_refused_by_name(tmp_path: Path) -> None:
    study = declared()
    new_SP, old_SP = counts_SP(0.3), counts_SP(0)
    rows = rows_of(study, new_SP, old_SP)
    name = next(run.run_id for run in study.runs if run.entry == "new" and run.seed == 1)

    unfinished = change(rows, name, row(name, 1, {0: new_SP[1], 20: new_SP[1]}))
    found = asked(study, unfinished, tmp_path)
    assert found.verdict == "refused"
    assert found.note.startswith(
        f"run {name} is unfinished: it was validated last at step 20, others of its entry at 40"
    )

    fewer = change(rows, name, row(name, 1, {0: new_SP[1][:-1], 40: new_SP[1][:-1]}))
    assert asked(study, fewer, tmp_path).note.startswith("different questions: run new-seed0")

    other_k = change(rows, name, row(name, 1, {0: new_SP[1], 40: new_SP[1]}, k=16))
    assert "different samples a question: run new-seed0" in asked(study, other_k, tmp_path).note

    changed = copy.deepcopy(rows)
    changed[name]["curve"]["40"]["mean@8"] += 0.001
    assert f"run {name}, step 40: its counts by question give mean@8=" in asked(study, changed, tmp_path).note

    empty = copy.deepcopy(rows)
    empty[name]["curve"] = {}
    assert asked(study, empty, tmp_path).note == f"run {name} has no validation"

    at = asked(declared(step=20), rows, tmp_path)
    assert at.note.endswith("was not validated at step 20; it was at 0, 40")


def test_entries_on_different_questions_are_refused_with_a_question_that_one_lacks(tmp_path: Path) -> None:
    study = declared()
    rows = rows_of(study, counts_SP(0.3), counts_SP(0))
    for run in study.runs:
        if run.entry == "old":
            rows[run.run_id] = row(run.run_id, run.seed, {40: counts_SP(0)[run.seed][:-1]})
    for count in (P, P - 1):
        write_questions(tmp_path, [f"q{i}" for i in range(count)])
    found = asked(study, rows, tmp_path)
    assert found.verdict == "refused" and "different items: new has 'q29', old has not (1 only in new" in found.note


def test_a_question_that_no_verifier_judged_is_named_as_unfinished(tmp_path: Path) -> None:
    study = declared()
    rows = rows_of(study, counts_SP(0.3), counts_SP(0))
    broken = next(one for one in rows.values() if one["run_id"].startswith("new-seed2"))
    right = [0, *counts_SP(0.3)[2][1:]]
    broken["items"]["right"]["40"] = " ".join(map(str, right))
    broken["items"]["judged"]["40"] = " ".join(["0"] + ["8"] * (P - 1))
    broken["curve"]["40"]["mean@8"] = float(np.mean(right[1:]) / K)
    assert "new, seed 2: evaluation not finished, 1 of 30 items" in asked(study, rows, tmp_path).note


def test_the_refusal_is_an_error_of_its_own(tmp_path: Path) -> None:
    study = declared()
    with pytest.raises(Refused, match="has no validation"):
        entry_accuracy(study, {study.runs[0].run_id: {"run_id": "x", "seed": 0, "curve": {}}}, "new", tmp_path)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"first": "none"}, r"questions\[0\]\.first is 'none'; allowed: one of new, old"),
        ({"second": "new"}, r"questions\[0\]\.second is 'new'; allowed: another entry than first"),
        ({"ask": ""}, r"questions\[0\]\.ask is ''"),
        ({"delta": 2}, r"questions\[0\]\.delta is 2; allowed: a share"),
        ({"metric": "pass@0"}, r"questions\[0\]\.metric is 'pass@0'; allowed: mean, maj or pass@k"),
        ({"step": "40"}, r"questions\[0\]\.step is '40'"),
        ({"pairing": "both"}, r"questions\[0\]\.pairing is 'both'"),
        ({"source": 3}, r"questions\[0\]\.source is 3"),
        ({"claim": "x"}, r"unknown key 'claim' in questions\[0\]"),
    ],
)
def test_a_wrong_question_is_one_clear_message(question: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"study.yaml: {message}"):
        declared(**question)
