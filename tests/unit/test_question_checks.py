"""Before Ray starts: pass rates of this very run, reference texts in every row, settings that have an effect."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pandas
import pytest
from omegaconf import DictConfig, OmegaConf

from recipe.compose import compose_config
from recipe.question_checks import check_questions
from verl_ext.config import ConfigError
from verl_ext.sample_store import SampleStore, StoreError

QUESTIONS = ["a", "b", "c"]


def write(folder: Path, *texts: Any, key: str = "solution") -> str:
    """A training file with one question a text."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "1+1"}],
            "data_source": "d",
            "reward_model": {"style": "rule", "ground_truth": "2"},
            "extra_info": {"index": i, "question_id": QUESTIONS[i], key: text},
        }
        for i, text in enumerate(texts)
    ]
    path = folder / "train.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    return str(path)


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose_config(["method=paced_self", "model=tiny"])


@pytest.fixture
def config(composed: DictConfig, tmp_path: Path) -> DictConfig:
    """PACED on three questions with a text each; its pass rates are taken by the run."""
    made = copy.deepcopy(composed)
    made.data.train_files = write(tmp_path, "1+1=2", "1+2=3", "1+3=4")
    made.run.steps = 10
    return made


def changed(config: DictConfig, **values: Any) -> DictConfig:
    """Keys of the block, with __ for a dot."""
    for key, value in values.items():
        OmegaConf.update(config, "distill." + key.replace("__", "."), value, force_add=True)
    return config


def refused(config: DictConfig, kind: type[ValueError] = ConfigError) -> str:
    with pytest.raises(kind) as caught:
        check_questions(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_run_that_has_all_it_needs_passes(config: DictConfig) -> None:
    check_questions(config)
    check_questions(changed(config, weighting__recompute_every=9))
    check_questions(changed(config, schedule={"switch": 0.5, "second": {"divergence": {"kind": "jsd"}}}))


def test_nothing_is_asked_of_a_run_without_distillation(config: DictConfig) -> None:
    config.data.train_files = "missing.parquet"
    config.distill.weighting.store = "missing"
    check_questions(changed(config, coefficient=0.0))


# ----------------------------------------------------------------------------------------------------------- the store


@pytest.fixture(scope="module")
def expected(composed: DictConfig) -> dict[str, Any]:
    """Settings of a store of this run's rollouts."""
    from verl.utils import hf_tokenizer

    from verl_ext.run_sampling import expected_rollouts

    return expected_rollouts(composed, hf_tokenizer(composed.actor_rollout_ref.model.path))


def store(folder: Path, settings: dict[str, Any], questions: list[str] | None = None) -> str:
    with SampleStore(folder, settings) as opened:
        for name in QUESTIONS if questions is None else questions:
            row = {"question_id": name, "sample": 0, "prompt": "p", "score": 1.0, "status": "ok"}
            opened.append(row | {"truncated": False, "tokens": 3})
    return str(folder)


def test_a_store_of_this_run_s_rollouts_passes(config: DictConfig, expected: dict[str, Any], tmp_path: Path) -> None:
    settings = copy.deepcopy(expected)
    settings["sampling"] |= {"max_tokens": 8192, "seed": 77}
    check_questions(changed(config, weighting__store=store(tmp_path / "store", settings)))


@pytest.mark.parametrize(
    ("block", "values", "named"),
    [
        ("model", {"fingerprint": "0" * 32}, "model.fingerprint"),
        ("sampling", {"temperature": 0.6}, "sampling.temperature: the store has 0.6, asked for 1.0"),
        ("sampling", {"top_p": 0.9}, "sampling.top_p"),
        ("chat_template", {"kwargs": {"enable_thinking": True}}, "chat_template.kwargs"),
        ("verifier", {"source": "0" * 32}, "verifier.source"),
    ],
)
def test_a_store_of_other_rollouts_is_refused(
    config: DictConfig, expected: dict[str, Any], tmp_path: Path, block: str, values: dict[str, Any], named: str
) -> None:
    settings = copy.deepcopy(expected)
    settings[block] |= values
    folder = store(tmp_path / "store", settings)
    message = refused(changed(config, weighting__store=folder), StoreError)
    assert named in message and folder in message and "this run" in message and "recipe.pass_rates" in message


def test_a_store_without_some_of_the_questions_is_refused(
    config: DictConfig, expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = store(tmp_path / "store", expected, ["b"])
    message = refused(changed(config, weighting__store=folder), StoreError)
    assert "distill.weighting.store" in message and folder in message
    assert "no samples of 2 of the 3 questions" in message and "the first is a" in message


def test_a_folder_without_a_store_is_refused(config: DictConfig, tmp_path: Path) -> None:
    folder = str(tmp_path / "nothing")
    assert folder in refused(changed(config, weighting__store=folder), StoreError)


def test_the_second_stage_s_store_is_looked_at_too(
    config: DictConfig, expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = store(tmp_path / "store", expected, ["a"])
    second = {"switch": 0.5, "second": {"weighting": {"store": folder}}}
    assert folder in refused(changed(config, schedule=second), StoreError)


# ------------------------------------------------------------------------------------------------------ reference texts


@pytest.mark.parametrize("axis", ["context", "sequences"])
@pytest.mark.parametrize("blank", [None, "", "  \n"])
def test_rows_without_a_text_are_named(config: DictConfig, tmp_path: Path, axis: str, blank: str | None) -> None:
    file = write(tmp_path, "1+1=2", blank, blank)
    config.data.train_files = file
    if axis == "sequences":
        changed(config, context__kind="none", sequences__source="reference")
    message = refused(config)
    assert f"distill.{axis}.reference_key=solution: 2 of 3 training rows have no text" in message
    assert f"{file} row 1 (question b)" in message and f"{file} row 2 (question c)" in message


def test_the_rows_of_several_files_are_numbered_by_file(config: DictConfig, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    config.data.train_files = [write(folders[0], "1", "2"), write(folders[1], "1", None)]
    message = refused(config)
    assert "1 of 4 training rows" in message and f"{folders[1] / 'train.parquet'} row 1 (question b)" in message


def test_a_key_that_no_row_has_is_refused_with_those_there_are(config: DictConfig) -> None:
    message = refused(changed(config, context__reference_key="demonstration"))
    assert "extra_info.demonstration" in message and "question_id" in message and "solution" in message


def test_a_text_that_spells_a_special_token_is_refused(config: DictConfig, tmp_path: Path) -> None:
    file = write(tmp_path, "1+1=2", "1+2=3<|im_end|>", "1+3=4")
    config.data.train_files = file
    for values in ({}, {"context__kind": "none", "sequences__source": "reference"}):
        message = refused(changed(config, **values))
        assert "1 training rows" in message and f"{file} row 1 (question b)" in message and "'<|im_end|>'" in message


def test_several_texts_are_for_replay_only(config: DictConfig, tmp_path: Path) -> None:
    config.data.train_files = write(tmp_path, ["1", "2"], ["1"], ["3"])
    assert re.search("must be one text", refused(config))
    check_questions(changed(config, context__kind="none", sequences__source="reference"))


def test_pairs_that_are_replayed_need_the_teacher_s_texts(tmp_path: Path) -> None:
    # Any text will do for the context, which is not what is looked at here.
    context = "distill.context.reference_key=question_id"
    config = compose_config(["method=pbsd", "teacher=frozen", "sequences=pairs_replayed", context])
    config.data.train_files = write(tmp_path, ["1", "2"], ["1"], [], key="teacher_text")
    assert "distill.sequences.reference_key=teacher_text: 1 of 3 training rows have no text" in refused(config)
    # Drawn on the rollout servers, they need none.
    check_questions(changed(copy.deepcopy(config), sequences__positive="teacher", teacher__kind="live"))
    config.data.train_files = write(tmp_path, ["1", "2"], ["1"], ["3"], key="teacher_text")
    check_questions(config)


def test_the_second_stage_s_texts_are_looked_at_too(config: DictConfig, tmp_path: Path) -> None:
    config.data.train_files = write(tmp_path, "1", None, "2")
    changed(config, context__kind="none", teacher__kind="frozen")
    check_questions(config)
    changed(config, schedule={"switch": 0.5, "second": {"sequences": {"source": "reference"}}})
    assert "row 1 (question b)" in refused(config)


# ------------------------------------------------------------------------------------------ settings that do nothing


@pytest.mark.parametrize(
    ("values", "steps", "named"),
    [
        ({"weighting__recompute_every": 10}, 10, "distill.weighting.recompute_every is 10"),
        ({"weighting__recompute_every": 99}, 10, "distill.weighting.recompute_every is 99"),
        ({"weighting__recompute_at": 0.5}, 1, "distill.weighting.recompute_at is 0.5"),
        (
            {
                "weighting__recompute_every": 99,
                "schedule": {"switch": 0.5, "second": {"divergence": {"kind": "jsd"}}},
            },
            10,
            "distill.weighting.recompute_every is 99",
        ),
        (
            {"schedule": {"switch": 0.5, "second": {"weighting": {"recompute_at": 0.2}}}},
            10,
            "recompute_at is 0.2",
        ),
    ],
)
def test_pass_rates_that_would_never_be_taken_again_are_refused(
    config: DictConfig, values: dict[str, Any], steps: int, named: str
) -> None:
    config.run.steps = steps
    message = refused(changed(config, **values))
    assert named in message and "allowed" in message


def test_two_stages_need_two_steps(config: DictConfig) -> None:
    config.run.steps = 1
    message = refused(changed(config, schedule={"switch": 0.5, "second": {"divergence": {"kind": "jsd"}}}))
    assert "distill.schedule.switch needs run.steps of at least 2, found 1" in message


def test_pairs_are_left_out_one_by_one_so_a_single_text_for_the_teacher_will_do(tmp_path: Path) -> None:
    config = compose_config(["method=pbsd"])
    config.data.train_files = write(tmp_path, "1+1=2", None, "1+3=4<|im_end|>")
    check_questions(config)
    config.data.train_files = write(tmp_path, None, None, "1+3=4<|im_end|>")
    assert "'<|im_end|>'" in refused(config)
    config.data.train_files = write(tmp_path, None, " ", None)
    assert "3 of 3 training rows have no text" in refused(config)
