"""Pass rates of a sample store: what is counted, what is left out, and whose rollouts they are."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_ext.pass_rate_store import PassRateTable, QuestionRate, bins, check_same_rollouts, read_pass_rates
from verl_ext.sample_store import SampleStore, StoreError, store_key
from verl_ext.weighting import beta_kernel, question_weights

SETTINGS: dict[str, Any] = {
    "model": {"path": "models/m", "fingerprint": "f"},
    "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_tokens": 64, "seed": 0},
    "chat_template": {"hash": "h", "kwargs": {"enable_thinking": False}},
    "verifier": {"path": "verl_ext.verifiers.math:compute_score", "kwargs": {}},
}
VERDICTS = st.tuples(st.sampled_from(["ok", "error", "timeout"]), st.sampled_from([0.0, 0.4, 0.5, 1.0]), st.booleans())


def row(question: str, sample: int, score: float | None = 1.0, **changed: Any) -> dict[str, Any]:
    values = {"question_id": question, "sample": sample, "prompt": "p", "score": score, "acc": score, "status": "ok"}
    return values | {"truncated": False, "tokens": 10} | changed


def broken(question: str, sample: int, status: str = "error") -> dict[str, Any]:
    return row(question, sample, None, status=status, error="it broke")


def fill(folder: Path, rows: list[dict[str, Any]]) -> Path:
    with SampleStore(folder, SETTINGS) as store:
        for values in rows:
            store.append(values)
        return store.path


def table(*pairs: tuple[int, int]) -> PassRateTable:
    """Questions q0, q1, ... with (successes, count)."""
    rates = {f"q{i}": QuestionRate(f"q{i}", s, c, 0, 0, 0, 1.0) for i, (s, c) in enumerate(pairs)}
    return PassRateTable(rates, copy.deepcopy(SETTINGS), max((c for _, c in pairs), default=0), Path("store"))


# ------------------------------------------------------------------------------------------------------------ counting


def test_what_a_verifier_could_not_judge_is_in_no_rate_and_counted(tmp_path: Path) -> None:
    rows = [
        row("a", 0, tokens=4),
        row("a", 1, 0.0, tokens=8, truncated=True),
        broken("a", 2),
        broken("a", 3, "timeout"),
    ]
    rows += [row("b", 0, 0.0), broken("c", 0), broken("c", 1)]
    fill(tmp_path, rows)
    read = read_pass_rates(tmp_path)
    assert read.rates["a"] == QuestionRate("a", successes=1, count=2, errors=1, timeouts=1, truncated=1, tokens=8.0)
    assert (read.rate("a"), read.rate("b")) == (0.5, 0.0)
    assert math.isnan(read.rate("c")) and math.isnan(read.rate("unknown"))
    assert read.missing(["b", "d", "c", "e", "d"]) == ["d", "e"], "c was sampled, though nothing came of it"
    assert (read.samples, read.settings, read.folder, read.key) == (4, SETTINGS, tmp_path, store_key(SETTINGS))
    assert read.evidence() == {"a": (1, 2), "b": (0, 1), "c": (0, 0)}


def test_the_reward_decides_and_not_the_verifier_s_acc(tmp_path: Path) -> None:
    fill(tmp_path, [row("q", 0, 0.7, acc=0.0), row("q", 1, 0.3, acc=1.0)])
    assert read_pass_rates(tmp_path).rate("q") == 0.5
    assert read_pass_rates(tmp_path, threshold=0.7).rate("q") == 0.5, "0.7 is met in the precision of the rewards"
    assert read_pass_rates(tmp_path, threshold=0.71).rate("q") == 0.0
    assert read_pass_rates(tmp_path, threshold=0.0).rate("q") == 1.0


def test_only_the_first_samples_count_where_a_number_is_given(tmp_path: Path) -> None:
    fill(tmp_path, [row("q", 3, 0.0), row("q", 1), row("q", 0), row("r", 3), row("q", 2, 0.0)])
    two = read_pass_rates(tmp_path, samples=2)
    assert two.rates.keys() == {"q"} and two.rate("q") == 1.0 and two.samples == 2
    assert read_pass_rates(tmp_path).rate("q") == 0.5
    for samples in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="samples is .*; allowed: a whole number from 1"):
            read_pass_rates(tmp_path, samples=samples)


def test_the_questions_of_one_run(tmp_path: Path) -> None:
    fill(tmp_path, [row("a", 0), row("b", 0), row("b", 1), row("c", 0)])
    some = read_pass_rates(tmp_path).only(["c", "unknown", "a", "c"])
    assert list(some.rates) == ["c", "a"] and some.samples == 1


@settings(max_examples=40)
@given(
    questions=st.dictionaries(st.sampled_from("abcd"), st.lists(VERDICTS, min_size=1, max_size=6), max_size=4),
    first=st.integers(1, 6),
)
def test_counts_are_those_of_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, questions: dict[str, list[tuple[str, float, bool]]], first: int
) -> None:
    folder = tmp_path_factory.mktemp("store")
    fill(
        folder,
        [
            row(name, i, score, truncated=cut, tokens=i) if status == "ok" else broken(name, i, status)
            for name, verdicts in questions.items()
            for i, (status, score, cut) in enumerate(verdicts)
        ],
    )
    read = read_pass_rates(folder, samples=first)
    assert read.rates.keys() == questions.keys()
    for name, verdicts in questions.items():
        used = verdicts[:first]
        judged = [score for status, score, _ in used if status == "ok"]
        rate = read.rates[name]
        assert (rate.successes, rate.count) == (sum(score >= 0.5 for score in judged), len(judged))
        assert rate.errors == sum(status == "error" for status, *_ in used)
        assert rate.timeouts == sum(status == "timeout" for status, *_ in used)
        assert rate.truncated == sum(cut for status, _, cut in used if status == "ok")
        assert rate.samples == len(used)
        lengths = [i if status == "ok" else 10 for i, (status, *_) in enumerate(used)]
        assert rate.tokens == pytest.approx(sum(lengths) / len(lengths))


def test_topping_up_gives_the_rates_of_one_go(tmp_path: Path) -> None:
    rows = [row(name, i, float((i + ord(name)) % 3 == 0)) for name in "abc" for i in range(8)]
    fill(tmp_path / "one", rows)
    for part in (rows[::2], rows[1::2]):
        fill(tmp_path / "two", part)
    one, two = (read_pass_rates(tmp_path / name) for name in ("one", "two"))
    assert one.rates == two.rates and one.samples == two.samples == 8


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"score": None}, "score is None; allowed: a finite number"),
        ({"score": "1"}, "score is '1'; allowed: a finite number"),
        ({"status": "fine"}, "status is 'fine'; allowed: ok, error, timeout"),
        ({"truncated": None}, "truncated is None; allowed: true, false"),
        ({"tokens": None}, "tokens is None; allowed: a finite number"),
    ],
)
def test_a_row_that_cannot_be_counted_is_named(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    path = fill(tmp_path, [row("p", 0), row("q", 3, **changed)])
    with pytest.raises(StoreError) as refusal:
        read_pass_rates(tmp_path)
    assert str(refusal.value) == f"{path}: sample 3 of question q: {message}"


def test_a_sample_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = fill(tmp_path, [row("q", 0)])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(StoreError, match="sample 0 of question q is there twice"):
        read_pass_rates(tmp_path)


def test_no_store_and_an_empty_store_and_a_torn_end(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="manifest.json: no such file"):
        read_pass_rates(tmp_path)
    path = fill(tmp_path, [])
    empty = read_pass_rates(tmp_path)
    assert (empty.rates, empty.samples) == ({}, 0)
    fill(tmp_path, [row("q", 0), row("q", 1)])
    path.write_bytes(path.read_bytes()[:-5])
    assert read_pass_rates(tmp_path).rates["q"].count == 1


# ------------------------------------------------------------------------------------------------- the same rollouts?


def changed_settings(**blocks: dict[str, Any]) -> dict[str, Any]:
    return {name: {**SETTINGS[name], **blocks.get(name, {})} for name in SETTINGS}


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"sampling": {"seed": 7, "max_tokens": 16384}},
        {"model": {"path": "elsewhere/m"}},
        {"chat_template": {"kwargs": {"enable_thinking": False}}},
    ],
)
def test_what_does_not_decide_a_rate_may_differ(blocks: dict[str, Any]) -> None:
    check_same_rollouts(table((1, 2)), changed_settings(**blocks), what="this run")


def test_every_other_setting_is_named() -> None:
    other = changed_settings(
        model={"path": "n", "fingerprint": "g"},
        sampling={"temperature": 0.6, "seed": 1},
        chat_template={"kwargs": {"enable_thinking": True}},
        verifier={"kwargs": {"strict": True}},
    )
    with pytest.raises(StoreError) as refusal:
        check_same_rollouts(table((1, 2)), other, what="this run")
    message = str(refusal.value)
    assert message.startswith("store holds pass rates of other rollouts than those of this run: ")
    for name, ours, asked in (
        ("model.path", "'models/m'", "'n'"),
        ("model.fingerprint", "'f'", "'g'"),
        ("sampling.temperature", "1.0", "0.6"),
        ("chat_template.kwargs.enable_thinking", "False", "True"),
        ("verifier.kwargs.strict", "'none'", "True"),
    ):
        assert f"{name}: the store has {ours}, asked for {asked}" in message
    assert "seed" not in message and "\n" not in message


def test_a_path_counts_where_nothing_else_names_the_model() -> None:
    nameless = table((1, 2))
    del nameless.settings["model"]["fingerprint"]
    other = changed_settings()
    other["model"] = {"path": "n"}
    with pytest.raises(StoreError, match="model.path: the store has 'models/m', asked for 'n'"):
        check_same_rollouts(nameless, other, what="this run")


# ---------------------------------------------------------------------------------------------------------- histogram


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n), max_size=30))))
def test_bins_count_the_successes(case: tuple[int, list[int]]) -> None:
    n, successes = case
    assert bins(table(*[(s, n) for s in successes]), n) == [successes.count(i) for i in range(n + 1)]


@given(
    st.lists(
        st.integers(0, 8).flatmap(lambda c: st.tuples(st.integers(0, c), st.just(c))),
        max_size=30,
    )
)
def test_the_outer_bins_hold_the_unsolved_and_the_solved(pairs: list[tuple[int, int]]) -> None:
    counts = bins(table(*pairs), 8)
    assert counts[0] == sum(s == 0 < c for s, c in pairs) and counts[8] == sum(s == c > 0 for s, c in pairs)
    assert sum(counts) == sum(c > 0 for _, c in pairs)


def test_more_samples_than_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="n is 4; allowed: at least the 8 samples of question q1"):
        bins(table((1, 2), (4, 8)), 4)


# ------------------------------------------------------------------------------------------------- why K samples do it


@pytest.mark.parametrize("k", [2, 4, 8, 16])
@pytest.mark.parametrize("p", [0.0, 0.03, 0.25, 0.5, 0.9, 1.0])
def test_the_paced_weight_of_k_samples_is_unbiased_up_to_one_factor(k: int, p: float) -> None:
    """E[p̂(1 - p̂)] = (1 - 1/K) p(1 - p) for s ~ Binomial(K, p), by enumeration (PACED, arXiv 2603.11178)."""
    estimates = table(*[(s, k) for s in range(k + 1)])
    mean = sum(
        math.comb(k, s) * p**s * (1 - p) ** (k - s) * rate * (1 - rate)
        for s, rate in enumerate(question.rate for question in estimates.rates.values())
    )
    assert mean == pytest.approx((1 - 1 / k) * p * (1 - p), rel=1e-13, abs=1e-15)


def test_other_exponents_are_not_unbiased() -> None:
    def mean(p: float, k: int = 8) -> float:
        return sum(math.comb(k, s) * p**s * (1 - p) ** (k - s) * math.sqrt(s * (k - s)) / k for s in range(k + 1))

    ratios = [mean(p) / math.sqrt(p * (1 - p)) for p in (0.05, 0.5)]
    assert ratios[1] - ratios[0] > 0.1


def test_the_weights_of_eight_samples_are_the_paper_s(tmp_path: Path) -> None:
    import torch

    fill(tmp_path, [row(f"q{s}", i, float(i < s)) for s in range(9) for i in range(8)])
    read = read_pass_rates(tmp_path)
    rates = torch.tensor([read.rate(f"q{s}") for s in range(9)], dtype=torch.float64)
    expected = [0, 0.109375, 0.1875, 0.234375, 0.25, 0.234375, 0.1875, 0.109375, 0]
    assert beta_kernel(rates, alpha=1, beta=1).tolist() == expected
    assert question_weights(rates, alpha=1, beta=1, normalizer="none").tolist() == expected
