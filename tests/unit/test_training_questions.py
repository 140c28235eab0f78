"""Which questions a run takes and what they weigh: over a whole run, and over one that is resumed at any step."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer

from verl_ext.config import distill_config
from verl_ext.pass_rates import GroupPassRates, group_pass_rates
from verl_ext.question_weights import BatchWeigher, RunningWeigher, StoredWeigher
from verl_ext.sample_store import SampleStore, StoreError
from verl_ext.sampling import SampleRequest, SamplingSettings
from verl_ext.training_questions import TrainingQuestions

ROOT = Path(__file__).resolve().parents[2]
K, QUESTIONS, STEPS, BATCH = 4, 10, 6, 3
STORE = {"alpha": 1.0, "beta": 1.0, "normalizer": "mean_active", "rates": "store", "samples": K}
REPLAY = {"sequences": {"source": "reference"}, "context": {"kind": "none"}}
LONG, BROKEN = "q3", "q6"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ROOT / "models/tiny_world/plain")


def successes(question: str, step: int) -> int:
    """Of K samples with the weights after ``step`` steps: a spread in which some questions are 0 or K."""
    return (int(question[1:]) * 2 + step * 3) % (K + 1)


def fill(folder: Path, questions: Sequence[str], step: int, samples: int = K) -> int:
    """Writes what a store lacks; how many samples that was."""
    drawn = 0
    with SampleStore(folder, {"model": {"step": step}, "sampling": {"temperature": 1.0}}) as store:
        for name in questions:
            for sample in range(samples):
                if (name, sample) in store:
                    continue
                score = None if name == BROKEN else float(sample < successes(name, step))
                status = "error" if name == BROKEN else "ok"
                row = {"question_id": name, "sample": sample, "prompt": "p", "score": score, "status": status}
                store.append(row | {"truncated": False, "tokens": 3})
                drawn += 1
    return drawn


@dataclass
class Sampling:
    """Stands for :class:`verl_ext.run_sampling.RunSampling`."""

    drawn: list[tuple[int, int, int]] = field(default_factory=list)

    def draw(
        self,
        requests: Sequence[SampleRequest],
        folder: Path,
        settings: SamplingSettings,
        *,
        step: int,
        what: str,
        config: DictConfig | None = None,
    ) -> None:
        names = [request.question_id for request in requests]
        self.drawn.append((step, settings.k, fill(folder, names, step, settings.k)))


@dataclass
class Run:
    """A run's questions, and the steps it has gone."""

    questions: TrainingQuestions
    warnings: list[str]
    sampling: Sampling = field(default_factory=Sampling)

    def step(self, done: int) -> tuple[Any, ...]:
        """What the trainer does between two checkpoints; what can be seen of it."""
        questions = self.questions
        if questions.due(done):
            questions.take(self.sampling, done)
        stage = questions.begin(done)
        taken = None if questions.stream is None else questions.stream.take(BATCH)
        positions = range(BATCH) if taken is None else taken
        weighed = questions.weigher([questions.ids[i] for i in positions], groups(done))
        rates = weighed.rates_P.nan_to_num(-1).tolist()
        shown = (stage.sequences.source, stage.divergence.kind, type(questions.weigher).__name__)
        return done, taken, shown, weighed.weights_P.tolist(), rates, questions.metrics()


def groups(done: int) -> GroupPassRates:
    """The rollouts of a batch: BATCH questions of 4."""
    uids = [f"uid{i}" for i in range(BATCH) for _ in range(4)]
    rewards = [float(j < (i + done) % 5) for i in range(BATCH) for j in range(4)]
    return group_pass_rates(uids, torch.tensor(rewards), torch.zeros(len(uids), dtype=torch.bool))


def rows() -> list[dict[str, Any]]:
    texts = {LONG: "1" * 60}
    return [{"question_id": f"q{i}", "solution": texts.get(f"q{i}", "7*2=4")} for i in range(QUESTIONS)]


def start(tokenizer: Any, folder: Path, distill: dict[str, Any], **changed: Any) -> Run:
    config = {
        "run": {"steps": changed.get("steps", STEPS), "seed": 0},
        "data": {"train_batch_size": 4, "shuffle": changed.get("shuffle", True), "seed": 1, "max_response_length": 48},
        "actor_rollout_ref": {"rollout": {"temperature": 1.0, "top_p": 1.0, "top_k": -1}},
    }
    config["data"]["apply_chat_template_kwargs"] = {}  # as in verl's own YAML
    there = changed.get("rows", rows())
    warnings: list[str] = []
    questions = TrainingQuestions(
        OmegaConf.create(config),
        distill_config(distill),
        there,
        tokenizer,
        folder=folder,
        requests=lambda: [SampleRequest(row["question_id"], []) for row in there],
        warn=warnings.append,
    )
    return Run(questions, warnings)


# ------------------------------------------------------------------------------------------------------- what is kept


def test_where_the_batch_decides_nothing_is_chosen_and_nothing_saved(tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path / "rates", {})
    run.questions.resume(0)
    for done in range(3):
        assert not run.questions.due(done)
        run.questions.begin(done)
    assert run.questions.stream is None and run.questions.metrics() == {} and run.warnings == []
    assert isinstance(run.questions.weigher, BatchWeigher)
    run.questions.save(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    run.questions.load(tmp_path / "checkpoint", 3)


def test_questions_without_weight_are_not_sampled_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path, {"weighting": STORE})
    run.step(0)
    assert run.sampling.drawn == [(0, K, QUESTIONS * K)]
    kept = [i for i in range(QUESTIONS) if f"q{i}" != BROKEN and 0 < successes(f"q{i}", 0) < K]
    assert set(run.questions.stream.take(3 * QUESTIONS)) == set(kept)
    # A broken verifier is not a wrong answer: counted by itself.
    assert run.questions.dropped == {"weight_zero": QUESTIONS - len(kept) - 1, "no_verdict": 1}
    assert run.questions.metrics() == {
        "questions/kept": float(len(kept)),
        "questions/dropped_weight_zero": float(QUESTIONS - len(kept) - 1),
        "questions/dropped_no_verdict": 1.0,
    }
    weighed = run.questions.weigher(run.questions.ids, groups(0)).weights_P
    assert [i for i, weight in enumerate(weighed.tolist()) if weight > 0] == kept
    assert float(weighed.sum()) / len(kept) == pytest.approx(1.0)
    assert len(run.warnings) == 2 and all(f"of {QUESTIONS} training questions" in warning for warning in run.warnings)


def test_reference_texts_that_are_too_long_leave_their_questions_out(tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path, REPLAY)
    run.step(0)
    assert run.questions.dropped == {"reference_too_long": 1}
    assert run.questions.metrics() == {
        "questions/kept": float(QUESTIONS - 1),
        "questions/dropped_reference_too_long": 1.0,
    }
    taken = run.questions.stream.take(5 * QUESTIONS)
    assert set(taken) == set(range(QUESTIONS)) - {3}
    assert run.warnings == [f"1 of {QUESTIONS} training questions are left out: reference too long"]


def test_a_question_with_one_text_that_fits_stays(tokenizer: Any, tmp_path: Path) -> None:
    there = rows()
    there[3]["solution"] = ["1" * 60, "2"]
    run = start(tokenizer, tmp_path, REPLAY, rows=there)
    run.step(0)
    assert run.questions.dropped == {} and len(run.questions.stream) == QUESTIONS and run.warnings == []


def test_both_reasons_are_counted_and_each_question_once(tokenizer: Any, tmp_path: Path) -> None:
    fill(tmp_path / "store", [f"q{i}" for i in range(QUESTIONS)], 0)
    run = start(tokenizer, tmp_path, REPLAY | {"weighting": STORE | {"store": str(tmp_path / "store")}})
    run.step(0)
    assert run.sampling.drawn == [], "a store was given"
    assert 0 < successes(LONG, 0) < K
    dropped = dict(run.questions.dropped)
    assert dropped.pop("reference_too_long") == 1
    extreme = [i for i in range(QUESTIONS) if f"q{i}" == BROKEN or successes(f"q{i}", 0) in (0, K)]
    assert sum(dropped.values()) == len(extreme)
    assert len(run.questions.stream) == QUESTIONS - 1 - len(extreme)


def test_no_question_left_is_an_error_with_the_reasons(tokenizer: Any, tmp_path: Path) -> None:
    there = [{"question_id": LONG, "solution": "1" * 60}]
    run = start(tokenizer, tmp_path / "a", REPLAY, rows=there)
    with pytest.raises(ValueError, match="no training question is left: of 1, 1 for reference_too_long are left out"):
        run.step(0)
    there = [{"question_id": name, "solution": "1"} for name in ("q0", "q5", BROKEN)]
    run = start(tokenizer, tmp_path / "b", {"weighting": STORE}, rows=there)
    expected = "no training question is left: of 3, 2 for weight_zero, 1 for no_verdict are left out"
    with pytest.raises(ValueError, match=expected):
        run.step(0)


def test_a_store_that_lacks_questions_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    fill(tmp_path, ["q0", "q1"], 0)
    run = start(tokenizer, tmp_path / "own", {"weighting": STORE | {"store": str(tmp_path)}})
    with pytest.raises(StoreError, match=f"no samples of {QUESTIONS - 2} of the {QUESTIONS} .* the first is q2"):
        run.step(0)


def test_rates_taken_again_change_what_is_kept_and_begin_a_new_epoch(tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path, {"weighting": STORE | {"recompute_every": 2, "samples": 3}}, shuffle=False)
    seen = [run.step(done) for done in range(STEPS)]
    assert [(step, samples) for step, samples, _ in run.sampling.drawn] == [(0, 3), (2, 3), (4, 3)]
    inside = {}
    for done, taken, *_ in seen:
        at = done - done % 2
        inside[at] = [i for i in range(QUESTIONS) if f"q{i}" != BROKEN and 0 < successes(f"q{i}", at) < 3]
        assert set(taken) <= set(inside[at]), done
        if done == at:
            assert taken == inside[at][:BATCH], "the new epoch begins with the step"
    assert inside[0] != inside[2] != inside[4], "or this test says nothing"


def test_what_was_drawn_before_is_not_drawn_again(tokenizer: Any, tmp_path: Path) -> None:
    fill(tmp_path / "step_0", [f"q{i}" for i in range(QUESTIONS - 2)], 0)
    run = start(tokenizer, tmp_path, {"weighting": STORE})
    run.questions.resume(0)
    run.step(0)
    assert run.sampling.drawn == [(0, K, 2 * K)]


# ------------------------------------------------------------------------------------------------------------- a resume


def two_stages(second: dict[str, Any], first: dict[str, Any] | None = None, **schedule: Any) -> dict[str, Any]:
    return (first or {}) | {"schedule": {"switch": 0.5, "second": second, **schedule}}


ON_POLICY = {"sequences": {"source": "student_rollouts"}, "divergence": {"kind": "reverse_kl"}}
RUNS: dict[str, dict[str, Any]] = {
    "rates of the batch": {"weighting": {"alpha": 0.5, "beta": 0.5}},
    "single pass": {"weighting": STORE},
    "a store": {"weighting": STORE | {"store": "STORE"}},
    "a store, again at the midpoint": {"weighting": STORE | {"store": "STORE", "recompute_at": 0.5}},
    "every two steps": {"weighting": STORE | {"recompute_every": 2}},
    "running estimate": {"weighting": {"alpha": 1.0, "beta": 1.0, "rates": "running", "decay": 0.7}},
    "replay": REPLAY,
    "two stages": two_stages(ON_POLICY, REPLAY | {"weighting": STORE}),
    "two stages, rates kept": two_stages(ON_POLICY, REPLAY | {"weighting": STORE}, recompute_pass_rates=False),
    "two stages and every two steps": two_stages(ON_POLICY, REPLAY | {"weighting": STORE | {"recompute_every": 2}}),
    "two stages, equal weights": two_stages(ON_POLICY, REPLAY),
    "two stages, the other order": two_stages(
        {"sequences": {"source": "reference"}}, {"context": {"kind": "none"}, "weighting": STORE}
    ),
    "replay comes second": two_stages({"sequences": {"source": "reference"}}, {"context": {"kind": "none"}}),
    "weights only in the first stage": two_stages({"weighting": {"rates": "batch"}}, {"weighting": STORE}),
    "weights only in the second stage": two_stages({"weighting": STORE}),
    "rates of the batch, then a running estimate": two_stages(
        {"weighting": {"rates": "running", "decay": 0.6}}, {"weighting": {"alpha": 1.0, "beta": 1.0}}
    ),
    "two running estimates": two_stages(
        {"weighting": {"decay": 0.6}}, {"weighting": {"alpha": 1.0, "beta": 1.0, "rates": "running"}}
    ),
    "a store for each stage": two_stages(
        {"weighting": {"store": "OTHER"}}, {"weighting": STORE | {"store": "STORE"}}, recompute_pass_rates=False
    ),
    "a store, then rates of its own": two_stages(
        {"weighting": {"store": None}}, {"weighting": STORE | {"store": "STORE"}}, recompute_pass_rates=False
    ),
}


def with_stores(value: Any, folder: Path) -> Any:
    """The block with the folders of two stores in it."""
    if isinstance(value, dict):
        return {key: with_stores(inner, folder) for key, inner in value.items()}
    return str(folder / value) if value in ("STORE", "OTHER") else value


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    for name, step in (("STORE", 0), ("OTHER", 1)):
        fill(folder / name, [f"q{i}" for i in range(QUESTIONS)], step)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_goes_on_like_an_uninterrupted_one(
    name: str, tokenizer: Any, stores: Path, tmp_path: Path
) -> None:
    distill = with_stores(RUNS[name], stores)
    whole = start(tokenizer, tmp_path / "rates", distill)
    whole.questions.resume(0)
    expected = []
    for done in range(STEPS):
        expected.append(whole.step(done))
        whole.questions.save(tmp_path / f"checkpoint_{done + 1}")
    drawn = [step for step, _, _ in whole.sampling.drawn]
    for done in range(STEPS):
        # As a run leaves it that was killed some steps after its checkpoint: later pass rates are there.
        folder = tmp_path / f"resumed_{done}"
        if (tmp_path / "rates").exists():
            shutil.copytree(tmp_path / "rates", folder)
        run = start(tokenizer, folder, distill)
        run.questions.resume(done)
        left = {int(path.name.removeprefix("step_")) for path in folder.glob("step_*")}
        assert left == {step for step in drawn if step <= done}, "those of steps that are lost are removed"
        if done:
            run.questions.load(tmp_path / f"checkpoint_{done}", done)
        assert [run.step(later) for later in range(done, STEPS)] == expected[done:], f"resumed after {done} steps"
        assert [(step, new) for step, _, new in run.sampling.drawn if step <= done] == [
            (step, 0) for step in drawn if step == done
        ], "samples with the weights of the checkpoint itself are used again"


def test_the_two_stages_of_a_run_differ(tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path, RUNS["two stages"])
    seen = [run.step(done) for done in range(STEPS)]
    stages = [("reference", "jsd")] * 3 + [("student_rollouts", "reverse_kl")] * 3
    assert [shown[:2] for _, _, shown, *_ in seen] == stages
    assert [step for step, _, _ in run.sampling.drawn] == [0, 3]
    assert "questions/dropped_reference_too_long" not in seen[-1][-1], "its text is not replayed any more"


def test_the_second_stage_s_own_store_and_settings_are_used(tokenizer: Any, stores: Path, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path, with_stores(RUNS["a store for each stage"], stores))
    for done, step in ((0, 0), (3, 1)):
        run.step(done)
        assert isinstance(run.questions.weigher, StoredWeigher)
        rates = run.questions.weigher(["q1", "q2", "q4"], groups(0)).rates_P.tolist()
        assert rates == [successes(name, step) / K for name in ("q1", "q2", "q4")]
    assert run.sampling.drawn == []


def test_the_second_stage_s_number_of_samples_is_drawn(tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path, two_stages({"weighting": {"samples": 2}}, {"weighting": STORE}))
    for done in (0, 3):
        run.step(done)
    assert [(step, samples) for step, samples, _ in run.sampling.drawn] == [(0, K), (3, 2)]


def test_the_running_estimate_is_in_the_checkpoint(tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path, RUNS["running estimate"])
    run.step(0)
    run.questions.save(tmp_path / "checkpoint")
    again = start(tokenizer, tmp_path, RUNS["running estimate"])
    again.questions.load(tmp_path / "checkpoint", 1)
    again.questions.begin(1)
    assert isinstance(again.questions.weigher, RunningWeigher)
    assert again.questions.weigher.estimate.state_dict() == run.questions.weigher.estimate.state_dict()


# ------------------------------------------------------------------------------------------------ what has gone missing


def test_pass_rates_that_are_gone_are_an_error_and_no_older_ones_are_used(tokenizer: Any, tmp_path: Path) -> None:
    # An interval that keeps every question with a rate: nothing but the missing folder itself tells.
    distill = {"weighting": STORE | {"kernel": "interval", "low": 0.0, "high": 1.0, "recompute_every": 2}}
    run = start(tokenizer, tmp_path / "rates", distill)
    for done in range(3):
        run.step(done)
    run.questions.save(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "rates" / "step_2")
    again = start(tokenizer, tmp_path / "rates", distill)
    again.questions.resume(3)
    with pytest.raises(StoreError, match="step_2"):
        again.questions.load(tmp_path / "checkpoint", 3)


def test_a_second_stage_s_decay_holds_in_it(tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path, RUNS["two running estimates"])
    seen = []
    for done in (0, 3):
        run.step(done)
        seen.append(run.questions.weigher.estimate.decay)
    assert seen == [0.9, 0.6]


@pytest.mark.parametrize("name", ["single pass", "running estimate"])
def test_a_checkpoint_without_its_questions_is_an_error(name: str, tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path / "rates", RUNS[name])
    for done in range(3):
        run.step(done)
    again = start(tokenizer, tmp_path / "rates", RUNS[name])
    again.questions.resume(3)
    with pytest.raises(ValueError, match=r"questions\.json"):
        again.questions.load(tmp_path / "checkpoint", 3)


def test_a_checkpoint_of_other_questions_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    run = start(tokenizer, tmp_path, REPLAY)
    run.step(0)
    run.questions.save(tmp_path / "checkpoint")
    there = rows()
    there[3]["solution"] = "2"
    again = start(tokenizer, tmp_path, REPLAY, rows=there)
    with pytest.raises(ValueError, match="kept="):
        again.questions.load(tmp_path / "checkpoint", 1)
