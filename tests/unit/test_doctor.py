"""Each check of the doctor says ok where all is well, and names what is wrong where it is not."""

from __future__ import annotations

import copy
import json
import re
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from transformers import AutoTokenizer

from recipe import doctor_equality, doctor_machine, doctor_prompts
from recipe.compose import ROOT, compose_config
from recipe.doctor import main
from recipe.doctor_machine import check_disk, check_folder, check_memory, check_versions, pinned_versions
from recipe.doctor_prompts import Question
from recipe.doctor_ray import judge_nodes
from recipe.doctor_verifier import GOLDEN, check_golden
from recipe.findings import FAIL, OK, SKIP, WARN, Finding, attempt, raise_failures, worst
from verl_ext.config import ConfigError
from verl_ext.memory_estimate import GIB

TINY = ROOT / "models" / "tiny_world" / "plain"


# Composing takes most of a second: twice for the whole file, and changed by hand from there.


@cache
def tiny() -> DictConfig:
    """The tiny world; never written to."""
    return compose_config([])


@cache
def big() -> DictConfig:
    """An 8B model on 8 GPUs; never written to."""
    return compose_config(["model=qwen3_8b", "hardware=gpu", "layout=gpus8", "run.steps=100", "run.save_every=10"])


def changed(base: DictConfig, **changes: Any) -> DictConfig:
    """A copy with other values; ``__`` in a name stands for a dot."""
    found = copy.deepcopy(base)
    OmegaConf.set_struct(found, False)
    for key, value in changes.items():
        OmegaConf.update(found, key.replace("__", "."), value)
    return found


@pytest.fixture(scope="module")
def config() -> DictConfig:
    return tiny()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def questions() -> list[Question]:
    texts = ["6(a)-0(b)-8", "1(a)+2", "3(a)*4(b)+5"]
    return [Question([{"role": "user", "content": t}], {"question_id": t, "solution": "(a)1+2=3"}) for t in texts]


# ---------------------------------------------------------------------------------------------------------- findings


def test_a_check_s_text_finding_refusal_and_breakage() -> None:
    def refused() -> None:
        raise ConfigError("data.x is 3; allowed: 4")

    def broken() -> None:
        raise KeyError("x")

    assert attempt("a", lambda: "so and so") == Finding("a", OK, "so and so")
    assert attempt("a", lambda: Finding("a", WARN, "hm")).status == WARN
    assert attempt("a", refused) == Finding("a", FAIL, "data.x is 3; allowed: 4")
    assert attempt("a", broken).line == "KeyError: 'x'" and "report" in attempt("a", broken).todo


def test_the_worst_status_is_that_of_the_whole() -> None:
    def of(*statuses: str) -> str:
        return worst([Finding("a", status, "") for status in statuses])

    assert of() == of(OK, SKIP) == OK and of(OK, WARN, SKIP) == WARN and of(WARN, FAIL, OK) == FAIL
    with pytest.raises(ConfigError, match="disk: full; delete"):
        raise_failures([Finding("memory", WARN, "tight"), Finding("disk", FAIL, "full", "delete")])
    assert raise_failures([Finding("memory", WARN, "tight"), Finding("x", OK, "")]) == ["warning: memory: tight"]


# ----------------------------------------------------------------------------------------------------------- machine


def test_the_lock_is_read_and_this_environment_is_as_in_it() -> None:
    lock = doctor_machine.lock_file()
    assert pinned_versions(lock)["verl"] == "0.9.1"
    assert check_versions(doctor_machine.installed_versions(), lock).status in (OK, WARN)


@pytest.mark.parametrize(
    ("installed", "status", "message"),
    [
        ({"verl": "0.9.1", "torch": "2.1.0+cu130"}, OK, "as in"),
        ({"verl": "0.9.1", "torch": "2.2.0+cu130"}, WARN, r"torch 2.2.0\+cu130 \(tested: 2.1.0\+cpu\)"),
        ({"verl": "0.9.2", "torch": "2.1.0"}, FAIL, "verl 0.9.2"),
        ({"verl": "0.9.1", "torch": None}, FAIL, "not installed: torch"),
    ],
)
def test_other_versions_are_named(tmp_path: Path, installed: dict, status: str, message: str) -> None:
    lock = tmp_path / "cpu.txt"
    lock.write_text("torch==2.1.0+cpu \\\n    --hash=sha256:0\nverl==0.9.1\nvllm-cpu==0.28.0\nray[default]==2.60.0\n")
    given = {"vllm": "0.28.0", "ray": "2.60.0", **installed}
    finding = check_versions(given, lock)
    assert finding.status == status
    assert re.search(message, finding.line)
    assert check_versions(given, tmp_path / "none.txt").status == WARN


ROLLOUT = "actor_rollout_ref__rollout__"


def test_memory_that_fits_is_tight_or_does_not_fit() -> None:
    finding, estimate = check_memory(big(), 79 * GIB, "assumed")
    assert finding.status == OK and estimate is not None and "sequences of full length" in finding.line
    assert check_memory(big(), 40 * GIB, "assumed")[0].status == FAIL
    small = changed(big(), **{f"{ROLLOUT}gpu_memory_utilization": 0.1})
    assert "one sequence" in check_memory(small, 79 * GIB, "")[0].todo
    rollout = changed(big(), **{f"{ROLLOUT}gpu_memory_utilization": 0.7})
    assert (check_memory(rollout, 79 * GIB, "")[0].status, check_memory(rollout, 79 * GIB, "")[0].todo[:11]) == (
        WARN,
        "the rollout",
    )
    long = changed(big(), actor_rollout_ref__actor__ppo_max_token_len_per_gpu=400_000, data__max_response_length=16_000)
    finding, _ = check_memory(long, 79 * GIB, "")
    assert finding.status == FAIL and finding.todo.startswith("the update does not fit")
    unknown, nothing = check_memory(changed(big(), actor_rollout_ref__model__path="some/model"), 79 * GIB, "")
    assert unknown.status == SKIP and nothing is None and "architectures.yaml" in unknown.todo


def test_disk_counts_what_is_kept_at_once_and_not_yet_there(tmp_path: Path) -> None:
    run = changed(big(), run__output_dir=str(tmp_path / "new" / "run"))
    # fp32 weights, two moments and the teacher of 8.19e9 parameters
    size = 4 * 4 * 8_190_735_360
    assert "10 checkpoints of 122.1 GiB" in check_disk(run, free=10 * size).line
    assert check_disk(run, free=10 * size - 1).status == FAIL
    assert check_disk(run, free=13 * size).status == OK
    kept = changed(run, run__keep_checkpoints=2, run__keep_best=False)
    assert check_disk(kept, free=3 * size - 1).status == FAIL and check_disk(kept, free=4 * size).status == OK
    for step in (10, 20):
        (tmp_path / "new" / "run" / "checkpoints" / f"global_step_{step}").mkdir(parents=True)
    assert "1 checkpoints" in check_disk(kept, free=2 * size).line
    assert check_disk(changed(big(), run__save_every=-1), free=0).status == OK
    frozen = check_disk(changed(run, distill__teacher__kind="frozen"), free=99 * size)
    assert "of 91.5 GiB" in frozen.line, "a frozen teacher is not in a checkpoint"


def test_before_training_only_a_full_disk_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "device_memory", lambda config: (24 * GIB, "a small GPU"))
    run = changed(big(), run__output_dir=str(tmp_path), run__save_every=-1)
    found = {finding.name: finding for finding in doctor_machine.cheap_findings(run)}
    assert found["memory"].status == WARN and "does not fit" in found["memory"].todo
    assert any(line.startswith("warning: memory: ") for line in raise_failures(found.values()))
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=GIB))
    with pytest.raises(ConfigError, match="disk: 10 checkpoints"):
        raise_failures(doctor_machine.cheap_findings(changed(run, run__save_every=10)))
    assert {one.status for one in doctor_machine.cheap_findings(tiny()) if one.name != "versions"} == {OK}


def test_the_output_folder_is_left_as_it_was(tmp_path: Path) -> None:
    new = tmp_path / "a" / "b"
    assert "is free" in str(check_folder(changed(tiny(), run__output_dir=str(new))))
    assert not (tmp_path / "a").exists()
    assert check_folder(tiny()).status == SKIP
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_folder(changed(tiny(), run__output_dir=str(tmp_path / "file" / "x")))


# ----------------------------------------------------------------------------------------------------------- prompts


class Templated:
    """A tokenizer that is only asked for texts."""

    def __init__(self, template: str | None, opening: str = "<assistant>") -> None:
        self.chat_template, self.opening = template, opening

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool, tokenize: bool, **given: Any) -> str:
        return messages[0]["content"] + (self.opening if add_generation_prompt else "")


def test_the_chat_template(config: DictConfig, tokenizer: Any) -> None:
    assert "<|im_start|>assistant" in doctor_prompts.check_template(config, tokenizer).line
    assert doctor_prompts.check_template(config, Templated(None)).status == FAIL
    assert doctor_prompts.check_template(config, Templated("{{ x }}", "")).status == WARN
    thinking = doctor_prompts.check_template(config, Templated("{% if enable_thinking %}"))
    assert thinking.status == WARN and "enable_thinking: false" in thinking.todo
    said = changed(tiny(), data__apply_chat_template_kwargs={"enable_thinking": False})
    assert doctor_prompts.check_template(said, Templated("{% if enable_thinking %}")).status == OK


def test_prompts_that_differ_between_student_and_teacher_are_refused(
    config: DictConfig, tokenizer: Any, questions: list[Question]
) -> None:
    ids = [tokenizer.apply_chat_template(q.messages, add_generation_prompt=True, return_dict=False) for q in questions]
    assert "3 prompts are the same" in doctor_prompts.check_parity(config, tokenizer, questions, ids)
    with pytest.raises(ValueError, match="row 1"):
        doctor_prompts.check_parity(config, tokenizer, questions, [ids[0], ids[1][:-1], ids[2]])
    shown = changed(
        tiny(), distill__context__kind="reference", distill__context__template_kwargs={"enable_thinking": True}
    )
    assert "enable_thinking" in doctor_prompts.check_parity(shown, tokenizer, questions, ids)


@pytest.mark.parametrize(("limit", "status"), [(15, OK), (14, WARN), (3, FAIL)])
def test_prompt_lengths(limit: int, status: str, tokenizer: Any, questions: list[Question]) -> None:
    finding = doctor_prompts.check_prompt_lengths(changed(tiny(), data__max_prompt_length=limit), tokenizer, questions)
    assert finding.status == status, finding.line
    assert "median 15, longest 15 tokens of 3 rows" in finding.line and f"limit {limit}" in finding.line


def reference(limit: int = 256) -> DictConfig:
    return changed(tiny(), distill__context__kind="reference", distill__context__max_length=limit)


@pytest.mark.parametrize(("limit", "status"), [(256, OK), (5, FAIL)])
def test_teacher_prompts_with_a_reference(limit: int, status: str, tokenizer: Any, questions: list[Question]) -> None:
    assert doctor_prompts.check_context_lengths(reference(limit), tokenizer, questions).status == status
    missing = [*questions, Question(questions[0].messages, {"question_id": "x", "solution": ""})]
    found = doctor_prompts.check_context_lengths(reference(), tokenizer, missing)
    assert found.status == WARN and "1 have no usable reference" in found.todo


def test_teacher_prompts_of_rollouts_are_only_known_later(tokenizer: Any, questions: list[Question]) -> None:
    def status(**changes: Any) -> str:
        return doctor_prompts.check_context_lengths(changed(tiny(), **changes), tokenizer, questions).status

    assert status() == OK and status(distill__context__max_length=70) == WARN
    assert status(distill__coefficient=0.0) == SKIP


# ----------------------------------------------------------------------------------------------------------- weights

DIVERGENCE = "distill__divergence__"
FORMS: dict[str, dict[str, Any]] = {
    "hidden states of the teacher, top-k": {},
    "whole vocabulary": {f"{DIVERGENCE}kind": "reverse_kl", f"{DIVERGENCE}support": "full", f"{DIVERGENCE}tail": False},
    "the teacher's top-k": {f"{DIVERGENCE}support": "teacher_topk", f"{DIVERGENCE}topk": 5},
    "ids of a student pass": {"distill__teacher__states": "log_probs"},
    "the sampled token": {f"{DIVERGENCE}kind": "sampled_token"},
    "another temperature": {"actor_rollout_ref__rollout__temperature": 1.3},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return doctor_equality._load(tiny())


@pytest.fixture
def loaded(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is read once for all tests."""
    monkeypatch.setattr(doctor_equality, "_load", lambda config: model)


PROMPTS = [[5, 9, 17, 3, 40], [12, 30, 31]]


@pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)
def test_equal_prompts_give_no_divergence_and_others_do(changes: dict[str, Any], loaded: None) -> None:
    config = changed(tiny(), **changes)
    assert doctor_equality.check_equality(config, PROMPTS, PROMPTS).status == OK
    other = doctor_equality.check_equality(config, PROMPTS, [PROMPTS[0], [12, 30, 50, 31]])
    assert other.status == FAIL and "chat template" in other.todo


def test_a_divergence_that_is_not_zero_at_equality_is_caught(
    loaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "biased_kind.py").write_text(
        "def entries(log_student, log_teacher, alpha):\n"
        "    return log_student.exp() * (log_student - log_teacher + 0.5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = changed(tiny(), **{**FORMS["whole vocabulary"], f"{DIVERGENCE}kind": "biased_kind:entries"})
    found = doctor_equality.check_equality(given, PROMPTS, PROMPTS)
    monkeypatch.delitem(sys.modules, "biased_kind")
    assert found.status == FAIL and "0.5 nats" in found.line


def test_without_distillation_or_with_another_model_there_is_nothing_to_compare() -> None:
    for changes in (
        {"distill__coefficient": 0.0},
        {"distill__teacher__kind": "external", "distill__teacher__path": "some/model"},
    ):
        assert doctor_equality.check_equality(changed(tiny(), **changes), PROMPTS, PROMPTS).status == SKIP


def test_small_weights_are_read_without_asking(tmp_path: Path) -> None:
    assert doctor_equality.is_small(str(TINY))
    assert not doctor_equality.is_small("Qwen/Qwen3-8B") and not doctor_equality.is_small(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------- verifier


@pytest.mark.parametrize("function", [name for name in GOLDEN if ".code:" not in name])
def test_the_golden_set_of_every_verifier(function: str) -> None:
    given = changed(tiny(), verifier__function=function)
    finding = check_golden(given)
    assert finding.status == OK and f"{len(GOLDEN[function])} of" in finding.line


def test_a_verifier_that_says_yes_to_everything_or_breaks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "verl_ext.verifiers.tiny_world:compute_score"
    given = tiny()
    monkeypatch.setattr("verl_ext.verifiers.tiny_world.compute_score", lambda **row: 1.0)
    found = check_golden(given)
    assert found.status == FAIL and "expected wrong" in found.line and name in found.todo

    def broken(**row: Any) -> float:
        raise RuntimeError("no")

    monkeypatch.setattr("verl_ext.verifiers.tiny_world.compute_score", broken)
    assert "ended in error" in check_golden(given).line
    own = changed(tiny(), verifier__function="json:dumps")
    assert check_golden(own).status == SKIP


# ----------------------------------------------------------------------------------------------------------- cluster


def node(**changes: Any) -> dict[str, Any]:
    found = {
        "host": "n1", "python": "3.11.7", "versions": {"verl": "0.9.1"}, "plugin": True, "engine": "DistillEngine",
        "device": "cuda", "gpu_bytes": 80 * GIB, "missing": [],
    }  # fmt: skip
    return found | changes


@pytest.mark.parametrize(
    ("second", "statuses", "message"),
    [
        (node(), [OK, OK], "2 of 2 nodes"),
        (node(plugin=False), [FAIL, OK], "not loaded"),
        (node(engine="FSDPEngineWithLMHead"), [FAIL, OK], "verl would build FSDPEngineWithLMHead"),
        (node(device="cpu"), [FAIL, OK], "sees no accelerator"),
        (node(missing=["/data/x"]), [OK, FAIL], "lacks /data/x"),
        (node(versions={"verl": "0.9.0"}), [OK, WARN], "verl: 0.9.0, 0.9.1"),
        (node(python="3.10.1"), [OK, WARN], "python"),
        ({"error": "no answer in 240 s"}, [FAIL, OK], "10.0.0.2: no answer"),
    ],
)
def test_a_node_that_is_not_like_the_others(second: dict, statuses: list[str], message: str) -> None:
    found = judge_nodes({"10.0.0.1": node(), "10.0.0.2": second}, cpu=False)
    assert [finding.status for finding in found] == statuses
    assert message in " ".join(finding.line for finding in found)


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command_offline(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipe.doctor.prepare_environment", lambda platform: {})
    monkeypatch.setattr("recipe.doctor.compose_config", lambda overrides: copy.deepcopy(big()))
    assert main(["--offline", "--json", "model=qwen3_8b", "hardware=gpu", "layout=gpus8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["status"] in (OK, WARN) and {"term", "bytes", "phases", "host"} == set(found["memory"][0])
    assert {f["status"] for f in found["findings"] if f["name"] in ("workers", "data files")} == {SKIP}
    assert main(["--offline", "--gpu-gib", "24", "model=qwen3_8b", "hardware=gpu", "layout=gpus8"]) == 1
    printed = capsys.readouterr().out
    assert "fail" in printed and "of 24.0" in printed and "not looked at with --offline: " in printed


def test_the_command_refuses_what_training_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--offline", "model=none_such"]) == 2
    assert "model=none_such does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--gpu-gib", "0"])
    assert caught.value.code == 2


def test_gpu_memory_is_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout="81559\n81559\n"))
    assert doctor_machine.gpu_memory() == [81559 << 20] * 2

    def none(*args: Any, **kwargs: Any) -> None:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(doctor_machine.subprocess, "run", none)
    assert doctor_machine.gpu_memory() == []
