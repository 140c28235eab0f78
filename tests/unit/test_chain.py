"""The chain's record: stages are run once, in order, and not again with other settings. The stages are stand-ins."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

from data_prep import tiny_world
from recipe import chain, sft
from recipe.chain_settings import chain_config
from recipe.compose import compose_config
from verl_ext.config import ConfigError

EVALUATED = {
    "base": {"val/mean@8": 0.4, "reviser/correction_rate": 0.3},
    "distil": {"val/mean@8": 0.6, "reviser/correction_rate": 0.5},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert tiny_world.main(["--out", str(folder), "--train-size", "12", "--test-size", "6"]) == 0
    return folder


@cache
def composed(method: str) -> Any:
    """Composing takes most of a second."""
    return compose_config([f"method={method}", "model=tiny_revision", "data=tiny_world_long", "run.steps=4"])


def compose(data: Path, out: Path, method: str = "sd_zero", **values: Any) -> Any:
    config = composed(method).copy()
    files = {"data__train_files": f"{data}/train.parquet", "data__val_files": f"{data}/test.parquet"}
    return chain._changed(config, run__output_dir=str(out), **files, **values)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    results = {
        "collect": {"attempts": 12, "revisions": 36, "files": ["sft.parquet"]},
        "sft": {"model": "tuned"},
        "distil": {"steps": 4, "checkpoint": "distilled"},
        "evaluate": EVALUATED,
    }

    def stage(name: str) -> Any:
        def run(config: Any, folder: Path, record: Any) -> dict:
            made.append(name)
            if name == "distil" and config.run.seed == 13:
                raise RuntimeError("killed")
            return results[name]

        return run

    monkeypatch.setattr(chain, "STAGE", {name: stage(name) for name in results})
    monkeypatch.setattr(chain, "ray_cluster", lambda config: nullcontext())
    return made


def test_every_stage_runs_once_and_the_summary_counts_samples(data: Path, tmp_path: Path, calls: list[str]) -> None:
    config = compose(data, tmp_path)
    summary = chain.run(config)
    assert calls == ["collect", "sft", "distil", "evaluate"]
    assert summary["samples"] == 12 + 36 + 4 * 16 * 8 and summary["steps"] == 4
    assert (summary["before"], summary["after"], summary["metric"]) == (0.4, 0.6, "val/mean@8")
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["stage"], row["val/mean@8"]) for row in rows] == [(0, "base", 0.4), (1, "distil", 0.6)]
    report = Path(summary["report"]).read_text()
    assert "Reviser" in report and "0 base, 1 distil" in report and "model 1: wrong attempts corrected 50%" in report
    assert chain.run(config)["after"] == 0.6 and len(calls) == 4


def test_a_chain_goes_on_at_the_stage_that_was_stopped(data: Path, tmp_path: Path, calls: list[str]) -> None:
    config = compose(data, tmp_path, run__seed=13)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="killed"):
            chain.run(config)
    assert calls == ["collect", "sft", "distil", "distil"]


def test_a_stage_with_other_settings_is_refused(data: Path, tmp_path: Path, calls: list[str]) -> None:
    chain.run(compose(data, tmp_path))
    for key, value, stage in (
        ("srt.revisions", 2, "collect"),
        ("distill.context.phrases", "paper", "collect"),
        ("sft.lr", 1e-3, "sft"),
        ("actor_rollout_ref.actor.optim.lr", 1e-3, "distil"),
        ("run.val_samples", 4, "evaluate"),
    ):
        with pytest.raises(ConfigError, match=f"holds the stage {stage} with other settings: {key}: it has"):
            chain.run(compose(data, tmp_path, **{key.replace(".", "__"): value}))
    # What does not decide a result may change.
    chain.run(compose(data, tmp_path, srt__concurrency=3, run__quiet=True))
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (["sft", "collect"], "in this order"),
        (["collect", "distil"], "together or neither"),
        (["collect", "train"], "names 'train'; allowed: collect, sft, distil, evaluate"),
    ],
)
def test_stages_are_checked(stages: list[str], message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        chain_config(compose(data, tmp_path, chain__stages=stages))


def test_what_is_evaluated_is_checked(data: Path, tmp_path: Path) -> None:
    for wrong in ([], ["base", "teacher"]):
        with pytest.raises(ConfigError, match=r"chain\.evaluate is .*some of \['base', 'sft', 'distil'\]"):
            chain_config(compose(data, tmp_path, chain__evaluate=wrong))


def test_distillation_alone_starts_from_the_model_itself(data: Path, tmp_path: Path) -> None:
    config = compose(data, tmp_path)
    assert chain._start_model(config, {}) == config.actor_rollout_ref.model.path
    assert chain._start_model(config, {"sft": {"summary": {"model": "tuned"}}}) == "tuned"


def test_fresh_questions_are_those_that_collect_did_not_ask(data: Path, tmp_path: Path) -> None:
    config = compose(data, tmp_path, srt__skip=2, srt__limit=5)
    path = chain.write_fresh_questions(config, tmp_path / "fresh.parquet")
    everything = [row["question_id"] for row in pq.read_table(data / "train.parquet")["extra_info"].to_pylist()]
    fresh = pq.read_table(path)
    assert [row["question_id"] for row in fresh["extra_info"].to_pylist()] == everything[:2] + everything[7:]
    assert fresh.schema.equals(pq.read_table(data / "train.parquet").schema)
    with pytest.raises(ConfigError, match=r"asked all 12 training questions; set srt\.limit"):
        chain.write_fresh_questions(compose(data, tmp_path), tmp_path / "none.parquet")


def test_two_fine_tuning_stages_follow_one_another(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def run(config: Any) -> dict:
        asked.append((list(config.sft.files), config.sft.out, config.actor_rollout_ref.model.path))
        return {"model": f"{config.sft.out}/model"}

    monkeypatch.setattr(sft, "run", run)
    config = compose(data, tmp_path, "sd_zero_code")
    record = {"collect": {"summary": {"files": ["a.parquet", "b.parquet"]}}}
    found = chain._sft(config, tmp_path, record)
    first = f"{tmp_path}/sft_1"
    assert asked == [
        (["a.parquet"], first, config.actor_rollout_ref.model.path),
        (["b.parquet"], f"{tmp_path}/sft_2", f"{first}/model"),
    ]
    assert found["model"] == f"{tmp_path}/sft_2/model"


def test_the_presets_say_what_their_sources_say(data: Path, tmp_path: Path) -> None:
    paper = compose_config(["method=sd_zero", "model=qwen3_4b_instruct", "data=openr1_math", "hardware=gpu"])
    assert (paper.srt.limit, paper.srt.attempts, paper.srt.revisions, paper.srt.top_p) == (10_000, 1, 3, 0.9)
    assert paper.run.steps * paper.data.train_batch_size * paper.actor_rollout_ref.rollout.n == 8960
    assert paper.distill.teacher.kind == "frozen" and paper.distill.divergence.kind == "reverse_kl"
    assert paper.chain.fresh_questions and paper.sft.lr == 5e-6 and paper.sft.epochs == 3
    code = compose_config(["method=sd_zero_code", "model=olmo3_7b", "data=codeforces", "hardware=gpu"])
    block = code.distill.divergence
    assert (block.kind, block.alpha, block.support, block.topk, block.tail) == ("mixed", 0.5, "teacher_topk", 64, False)
    assert code.srt.losses == "two_stage" and code.srt.placement == "user" and not code.srt.revise_right
    rft = compose_config(["method=rft", "model=qwen3_4b_instruct", "data=openr1_math", "hardware=gpu"])
    assert rft.srt.attempts == 4 and rft.srt.revisions == 0 and "distil" not in rft.chain.stages
    assert OmegaConf.to_container(rft.chain.stages) == ["collect", "sft", "evaluate"]


def test_right_answers_by_question_are_those_of_the_evaluated_samples(tmp_path: Path) -> None:
    verdicts = {("q2", 0): (1.0, "ok"), ("q1", 0): (0.0, "ok"), ("q2", 1): (1.0, "ok"), ("q1", 1): (None, "error")}
    lines = [
        {"question_id": name, "sample": sample, "prompt": "p", "acc": acc, "pred": "7", "status": status,
         "tokens": 3, "truncated": False}
        for (name, sample), (acc, status) in verdicts.items()
    ]  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "settings": {}, "key": "k"}))
    (tmp_path / "samples-k.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    counts = chain._item_counts(tmp_path)
    assert (counts["items"], counts["right"], counts["judged"]) == (["q1", "q2"], [0, 2], [1, 2])
    config = compose_config(["model=tiny", "data=tiny_world", "hardware=cpu"])
    assert chain._accuracy(config, tmp_path)["val/mean@2"] == pytest.approx((0 / 1 + 2 / 2) / 2)
