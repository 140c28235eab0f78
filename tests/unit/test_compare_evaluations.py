"""`python -m recipe.compare_evaluations` on evaluations in files: what it computes and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipe.compare_evaluations import main
from recipe.evaluation_items import Item, write_items

Write = Callable[..., Path]

FIRST = {"q1": [1, 1, 0, 1], "q2": [0, 1, 0, 0], "q3": [1, 1, 1, 1], "q4": [0, 0, 1, 1], "q5": [1, 0, 1, 1]}
SECOND = {"q3": [0, 1, 1, 0], "q2": [0, 0, 0, 0], "q1": [1, 0, 0, 1], "q4": [0, 1, 0, 1], "q5": [0, 0, 1, 0]}
SETTINGS = {
    "model": {"path": "m", "fingerprint": "f"},
    "sampling": {"temperature": 1.0, "seed": 0},
    "chat_template": {"hash": "h", "kwargs": {}},
    "verifier": {"path": "v", "source": "s"},
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an evaluation; an item's verdict may be None, and its answer is the verdict's text."""

    def made(name: str, correct: dict[str, list[Any]], *, asked: dict[str, str] | None = None, **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        items = [
            Item(
                item=item,
                data_source="s",
                question=(asked or {}).get(item, "same"),
                correct=row,
                answers=[None if verdict is None else str(verdict) for verdict in row],
                statuses=["error" if verdict is None else "ok" for verdict in row],
                tokens=[5] * len(row),
                truncated=[False] * len(row),
                format=[1.0] * len(row),
            )
            for item, row in correct.items()
        ]
        digest = write_items(folder / "items.jsonl", items)
        result = {
            "format": 1,
            "samples": max(map(len, correct.values()), default=0),
            "versions": {"vllm": settings.pop("vllm", "1")},
            "settings": {**SETTINGS, **settings},
            "items": {"file": "items.jsonl", "sha256": digest},
        }
        (folder / "evaluation.json").write_text(json.dumps(result))
        return folder

    return made


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    return json.loads(printed.out), printed.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out
    return printed.err


def test_items_are_paired_by_their_ids(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write("a", FIRST), write("b", SECOND)
    found, said = call(capsys, a, b, "--out", tmp_path / "out.json")
    differences = [(sum(FIRST[q]) - sum(SECOND[q])) / 4 for q in FIRST]
    mean = sum(differences) / 5
    deviation = (sum((d - mean) ** 2 for d in differences) / 4) ** 0.5
    assert found["value"] == pytest.approx(mean)
    # Student's t with 4 degrees of freedom at 97.5 %.
    assert found["high"] - found["value"] == pytest.approx(2.7764451 * deviation / 5**0.5)
    # All signs of 5 differences, one of which is 0: of 32 flips, 2 x 2 reach this sum.
    assert found["p_items"] == pytest.approx(4 / 32) and found["p_seeds"] is None
    assert (found["population"], found["n_items"], found["n_seeds"]) == ("items", 5, 1)
    assert found["claim"] == f"A ({a}) > B ({b})" and found["verdict"] == "yes"
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert "it says nothing about other training runs" in said and "permutation p over questions: 0.125" in said
    assert call(capsys, a, b, "--delta", "0.3")[0]["verdict"] == "not resolved"


def test_majority_and_pass_at_k_item_by_item(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write("a", FIRST), write("b", SECOND)
    majority = {"q1": (1, 0.5), "q2": (0, 0), "q3": (1, 0.5), "q4": (0.5, 0.5), "q5": (1, 0)}
    expected = sum(x - y for x, y in majority.values()) / 5
    assert call(capsys, a, b, "--metric", "maj")[0]["value"] == pytest.approx(expected)
    shares = [
        [sum(bool(row[i] + row[j]) for i, j in ((0, 1), (0, 2), (1, 2))) / 3 for row in correct.values()]
        for correct in (FIRST, SECOND)
    ]
    found = call(capsys, a, b, "--metric", "pass@2", "--samples", "3")[0]
    assert found["value"] == pytest.approx(sum(shares[0]) / 5 - sum(shares[1]) / 5)


def test_several_runs_speak_about_methods(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = write("a", FIRST), write("b", SECOND), write("c", {q: row[::-1] for q, row in FIRST.items()})
    found, said = call(capsys, a, c, "--against", b, b)
    assert (found["population"], found["pairing"], found["n_seeds"]) == ("seeds and items", "unpaired", 2)
    assert found["A"] == [str(a), str(c)] and "permutation p over runs" in said
    assert call(capsys, a, c, "--against", b, b, "--pairing", "paired")[0]["pairing"] == "paired"
    assert call(capsys, a, c, "--against", b, "--population", "items")[0]["n_seeds"] == 1


def test_settings_that_differ_are_named_and_those_of_the_measurement_refused(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write("a", FIRST)
    seed = write("seed", SECOND, sampling={"temperature": 1.0, "seed": 1}, model={"path": "n"}, vllm="2")
    said = call(capsys, a, seed)[1]
    assert f"differs: {seed}: vllm: {a} has '1', this one has '2'" in said and "sampling.seed" not in said
    for name, settings, line in (
        ("t", {"sampling": {"temperature": 0.5, "seed": 0}}, "sampling.temperature: {} has 1.0, this one has 0.5"),
        ("v", {"verifier": {"path": "v", "source": "z"}}, "verifier.source: {} has 's', this one has 'z'"),
        ("k", {"chat_template": {"hash": "h", "kwargs": {"thinking": True}}}, "chat_template.kwargs"),
        ("c", {"context": {"kind": "reference"}}, "context.kind: {} has 'none', this one has 'reference'"),
    ):
        other = write(name, SECOND, **settings)
        error = refused(capsys, a, other)
        assert line.format(a) in error and "--other-settings" in error
        assert line.format(a) in call(capsys, a, other, "--other-settings")[1]


def test_questions_without_verdicts_are_refused_or_left_out_in_both(
    write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write("a", {**FIRST, "q2": [None] * 4, "q4": [1, 0, None, 0]})
    b = write("b", SECOND)
    assert f"{a}: 1 items have fewer than 1 verdicts" in refused(capsys, a, b)
    assert "2 items have fewer than 4 verdicts" in refused(capsys, a, b, "--metric", "pass@4")
    found = call(capsys, a, b, "--leave-out-unjudged")[0]
    kept = {"q1": 3 / 4, "q3": 1, "q4": 1 / 3, "q5": 3 / 4}
    assert found["n_items"] == 4
    assert found["value"] == pytest.approx(sum(share - sum(SECOND[q]) / 4 for q, share in kept.items()) / 4)
    assert call(capsys, a, b, "--leave-out-unjudged", "--metric", "pass@4")[0]["n_items"] == 3
    nothing = write("nothing", {q: [None] * 4 for q in FIRST})
    assert "no item has enough verdicts" in refused(capsys, nothing, b, "--leave-out-unjudged")


def test_what_cannot_be_compared_is_refused_by_name(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write("a", FIRST), write("b", SECOND)
    none = a.parent / "none"
    assert "1 evaluations given; expected A and B" in refused(capsys, a)
    assert f"{none}: no evaluation.json there; expected a folder of recipe.evaluate" in refused(capsys, a, none)
    assert "--samples 5; it has 4 samples an item" in refused(capsys, a, b, "--samples", "5")
    assert "--metric pass@8 needs 8 samples an item, found 4" in refused(capsys, a, b, "--metric", "pass@8")
    for metric in ("avg", "pass@", "pass@0", "mean@4"):
        for more in ([], ["--leave-out-unjudged"]):
            assert f"--metric {metric}; allowed: mean, maj, pass@k" in refused(capsys, a, b, "--metric", metric, *more)
    assert "needs at least 2 seeds" in refused(capsys, a, b, "--population", "seeds")
    assert "level must lie strictly between 0 and 1" in refused(capsys, a, b, "--level", "1")

    fewer = write("fewer", {q: row for q, row in SECOND.items() if q != "q5"})
    assert f"different items: A ({a}) has 'q5', B ({fewer}) has not" in refused(capsys, a, fewer)
    assert "are of different items: 1 stand in one only, such as 'q5'" in refused(capsys, a, fewer, "--against", b, a)
    more = write("more", {q: [*row, 1] for q, row in SECOND.items()})
    assert f"different k: A ({a}) has 4 samples an item, B ({more}) has 5" in refused(capsys, a, more)
    assert "its evaluations have 4, 5 samples an item" in refused(capsys, a, more, "--against", b, a)
    assert call(capsys, a, more, "--samples", "4")[0]["n_items"] == 5
    other = write("other", SECOND, asked={"q2": "changed"})
    assert f"{other}: 1 questions have another text or answer than in {a}: q2" in refused(capsys, a, other)
    assert "items.jsonl: holds no question" in refused(capsys, a, write("empty", {}))


def test_a_damaged_evaluation_is_refused_by_name(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write("a", FIRST), write("b", SECOND)
    items = b / "items.jsonl"
    items.write_text("".join(items.read_text().splitlines(keepends=True)[:-1]))
    assert f"{items} is not the one that" in refused(capsys, a, b)
    items.write_text('{"item": "q"}\n')
    assert "items.jsonl, line 1: 'data_source' is missing" in refused(capsys, a, b)
    for text, message in (("{", "evaluation.json: not valid JSON"), ('{"format": 7}', "no evaluation of format 1")):
        (b / "evaluation.json").write_text(text)
        assert message in refused(capsys, a, b)
