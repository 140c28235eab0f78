"""The sampler: what is drawn, judged, written and refused. Only the rollout server is a stand-in."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer

from recipe.sample import summarize
from verl_ext.config import ConfigError
from verl_ext.sample_store import SampleStore, StoreError, differences, read_store
from verl_ext.sampling import Sampler, SampleRequest, SamplingSettings
from verl_ext.sampling_prompts import PromptBuilder, PromptError
from verl_ext.verification import Verifier, read_verdict

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "tiny_world" / "plain"
REQUEST = SampleRequest("q1", [{"role": "user", "content": "Work left to right mod 10: 7(a)+4"}], ground_truth="1")
SETTINGS = {"model": {"path": "m", "fingerprint": "f"}, "sampling": {"temperature": 1.0}}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@dataclass
class Output:
    token_ids: list[int]
    stop_reason: str = "completed"


class FakeClient:
    """Stands at verl's ``LLMServerClient.generate``: answers with ``answer(number of the call)``."""

    def __init__(self, tokenizer: Any, answer: Callable[[int], Any] = lambda call: "(a)7+4=1\\boxed{1}") -> None:
        self.tokenizer, self.answer = tokenizer, answer
        self.calls: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Output:
        number = len(self.calls)
        self.calls.append({"prompt_ids": prompt_ids, **sampling_params})
        sampling_params.clear()  # the real server takes keys out of the dict
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        await asyncio.sleep(0.001)
        self.under_way -= 1
        answer = self.answer(number)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Output):
            return answer
        return Output([*self.tokenizer.encode(answer, add_special_tokens=False), self.tokenizer.eos_token_id])


def judge(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> dict[str, Any]:
    right = solution_str.endswith(f"\\boxed{{{ground_truth}}}")
    return {"score": float(right), "pred": solution_str[-2:-1], "feedback": "" if right else "no", "status": "ok"}


def sampler(client: FakeClient, verifier: Any = judge, k: int = 2, max_tokens: int = 48, **options: Any) -> Sampler:
    settings = SamplingSettings(k=k, max_tokens=max_tokens)
    return Sampler(client, client.tokenizer, settings, Verifier(verifier, {"path": "test"}), **options)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_k_samples_a_question_verified(tokenizer: Any) -> None:
    client = FakeClient(tokenizer, lambda call: "\\boxed{1}" if call % 2 else "\\boxed{2}")
    results = sampler(client, k=4).run([REQUEST])
    assert sorted(result.sample for result in results) == [0, 1, 2, 3]
    assert sorted(result.score for result in results) == [0.0, 0.0, 1.0, 1.0]
    wrong = next(result for result in results if result.score == 0)
    assert (wrong.text, wrong.pred, wrong.feedback) == ("\\boxed{2}", "2", "no")
    assert (wrong.finish, wrong.truncated) == ("stop", False)
    assert wrong.tokens == len(tokenizer.encode("\\boxed{2}", add_special_tokens=False)) + 1


def test_the_prompt_is_that_of_training_and_every_sample_has_its_own_seed(tokenizer: Any) -> None:
    client = FakeClient(tokenizer)
    sampler(client, k=3).run([REQUEST])
    expected = tokenizer.apply_chat_template(REQUEST.messages, add_generation_prompt=True, return_dict=False)
    assert [call["prompt_ids"] for call in client.calls] == [expected] * 3
    assert len({call["seed"] for call in client.calls}) == 3
    again = FakeClient(tokenizer)
    sampler(again, k=3).run([REQUEST])
    assert [call["seed"] for call in again.calls] == [call["seed"] for call in client.calls]
    assert client.calls[0]["max_tokens"] == 48 and client.calls[0]["temperature"] == 1.0


def test_seeds_differ_between_questions_and_settings() -> None:
    settings = SamplingSettings(seed=0)
    assert settings.parameters("a", 0)["seed"] != settings.parameters("b", 0)["seed"]
    assert settings.parameters("a", 0)["seed"] != SamplingSettings(seed=1).parameters("a", 0)["seed"]
    assert "seed" not in SamplingSettings(seed=None).parameters("a", 0)


def test_concurrency_is_bounded(tokenizer: Any) -> None:
    client = FakeClient(tokenizer)
    sampler(client, k=20, concurrency=3).run([REQUEST])
    assert len(client.calls) == 20 and client.most_under_way == 3


def test_a_response_cut_at_the_limit_is_truncated_and_one_that_ends_there_is_not(tokenizer: Any) -> None:
    body = tokenizer.encode("(a)7+4=1", add_special_tokens=False)
    cut = sampler(FakeClient(tokenizer, lambda _: Output(body)), k=1, max_tokens=len(body)).run([REQUEST])[0]
    assert (cut.truncated, cut.finish, cut.tokens) == (True, "length", len(body))
    ended = Output([*body[:-1], tokenizer.eos_token_id])
    whole = sampler(FakeClient(tokenizer, lambda _: ended), k=1, max_tokens=len(body)).run([REQUEST])[0]
    assert (whole.truncated, whole.finish) == (False, "stop")
    other_end = sampler(
        FakeClient(tokenizer, lambda _: Output(body)), k=1, max_tokens=len(body), stop_token_ids=[body[-1]]
    ).run([REQUEST])[0]
    assert not other_end.truncated


def test_an_aborted_request_is_asked_again(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verl_ext.sampling.SECONDS_BETWEEN_RETRIES", 0)
    client = FakeClient(tokenizer, lambda call: Output([5], "aborted") if call < 2 else "\\boxed{1}")
    assert sampler(client, k=1).run([REQUEST])[0].text == "\\boxed{1}" and len(client.calls) == 3
    with pytest.raises(RuntimeError, match="aborted sample 0 of question q1"):
        sampler(FakeClient(tokenizer, lambda _: Output([], "aborted")), k=1).run([REQUEST])


def test_a_prompt_without_room_is_refused_before_anything_is_drawn(tokenizer: Any) -> None:
    client = FakeClient(tokenizer)
    length = len(tokenizer.apply_chat_template(REQUEST.messages, add_generation_prompt=True, return_dict=False))
    with pytest.raises(PromptError, match=f"q1.*{length} tokens.*max_tokens=48.*{length + 47}"):
        sampler(client, max_model_len=length + 47).run([REQUEST])
    assert client.calls == []
    sampler(client, max_model_len=length + 48).run([REQUEST])
    assert len(client.calls) == 2


def test_two_questions_of_one_id_are_refused(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="q1 is there twice"):
        sampler(FakeClient(tokenizer)).run([REQUEST, REQUEST])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 0.0, "k": 2}, "k is 2; allowed: 1 with temperature 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"k": 0}, "k is 0"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**values)


# --- continuation ----------------------------------------------------------------------------------------------------


def test_an_open_turn_is_continued_and_judged_whole(tokenizer: Any) -> None:
    client = FakeClient(tokenizer, lambda _: "=1\\boxed{1}")
    seen: list[str] = []

    def verifier(solution_str: str, **_: Any) -> float:
        seen.append(solution_str)
        return 1.0

    request = SampleRequest("q1", REQUEST.messages, prefix="(a)7+4", ground_truth="1")
    result = sampler(client, verifier, k=1).run([request])[0]
    prompt = tokenizer.decode(client.calls[0]["prompt_ids"])
    assert prompt.endswith("<|im_start|>assistant\n(a)7+4")
    assert seen == ["(a)7+4=1\\boxed{1}"] and result.text == "=1\\boxed{1}"
    sampler(client, verifier, k=1).run([dataclasses.replace(request, judge_prefix=False)])
    assert seen[1:] == ["=1\\boxed{1}"]


def test_a_template_without_a_generation_prompt_cannot_continue() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    prompts = PromptBuilder(tokenizer)
    assert prompts("q1", REQUEST.messages, None)
    with pytest.raises(PromptError, match="question q1: the chat template opens no assistant turn"):
        prompts("q1", REQUEST.messages, "(a)")


def test_a_prefix_that_the_tokenizer_lacks_characters_for_is_refused(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match="question q1: the tokenizer cannot continue the prefix"):
        PromptBuilder(tokenizer)("q1", REQUEST.messages, "Ü")


def test_a_closed_assistant_turn_at_the_end_is_refused(tokenizer: Any) -> None:
    messages = [*REQUEST.messages, {"role": "assistant", "content": "(a)"}]
    with pytest.raises(PromptError, match="give the text of an open turn as prefix"):
        PromptBuilder(tokenizer)("q1", messages, None)


# --- verification ----------------------------------------------------------------------------------------------------


def test_a_verifier_that_raises_is_an_error_and_not_a_wrong_answer(tokenizer: Any, tmp_path: Path) -> None:
    def broken(solution_str: str, **_: Any) -> float:
        if "2" in solution_str:
            raise RuntimeError("sandbox is down")
        return 1.0

    client = FakeClient(tokenizer, lambda call: "\\boxed{2}" if call == 0 else "\\boxed{1}")
    with SampleStore(tmp_path, SETTINGS) as store:
        results = sampler(client, broken, k=2).run([REQUEST], store)
    failed = next(result for result in results if result.status == "error")
    assert failed.score is None and failed.error == "RuntimeError: sandbox is down" and failed.text == "\\boxed{2}"
    summary = summarize(read_store(tmp_path)[1])
    assert (summary["mean"], summary["samples"], summary["verifier_errors"]) == (1.0, 2, 1)


def test_async_verifiers_and_plain_numbers(tokenizer: Any) -> None:
    async def later(**_: Any) -> float:
        await asyncio.sleep(0)
        return 0.25

    result = sampler(FakeClient(tokenizer), later, k=1).run([REQUEST])[0]
    assert (result.score, result.acc, result.pred, result.status) == (0.25, 0.25, None, "ok")


@pytest.mark.parametrize(
    "result", [float("nan"), None, {"pred": "1"}, {"score": "high"}, {"score": 0.0, "status": "error"}]
)
def test_a_result_without_a_number_is_an_error(result: Any) -> None:
    verdict = read_verdict(result)
    assert verdict.status == "error" and verdict.score is None and verdict.error


def test_the_verifier_is_loaded_as_verl_loads_it_and_its_source_counts(tmp_path: Path) -> None:
    path = tmp_path / "verifier.py"
    path.write_text("def score(data_source, solution_str, ground_truth, extra_info, bonus=0):\n    return 1 + bonus\n")
    function = {"path": str(path), "name": "score", "reward_kwargs": {"bonus": 0.5}}
    config = OmegaConf.create({"reward": {"custom_reward_function": function}})
    verifier = Verifier.from_config(config)
    asked = {"data_source": "", "solution_str": "", "ground_truth": "", "extra_info": {}}
    assert asyncio.run(verifier(**asked)).score == 1.5
    assert verifier.identity["kwargs"] == {"bonus": 0.5}
    path.write_text(path.read_text() + "# changed\n")
    assert Verifier.from_config(config).identity["source"] != verifier.identity["source"]
    config.reward.custom_reward_function.name = "missing"
    with pytest.raises(ConfigError, match="custom_reward_function cannot be loaded.*missing"):
        Verifier.from_config(config)


def test_a_verifier_may_not_change_the_request(tokenizer: Any) -> None:
    def greedy(extra_info: dict[str, Any], **_: Any) -> float:
        return float(extra_info.pop("problem", None) is not None)

    request = SampleRequest("q1", REQUEST.messages, extra_info={"problem": "7(a)+4"})
    assert [result.score for result in sampler(FakeClient(tokenizer), greedy, k=3).run([request])] == [1.0] * 3


# --- the store -------------------------------------------------------------------------------------------------------


def test_only_missing_samples_are_drawn(tokenizer: Any, tmp_path: Path) -> None:
    client = FakeClient(tokenizer)
    with SampleStore(tmp_path, SETTINGS) as store:
        assert len(sampler(client, k=2).run([REQUEST], store)) == 2
    with SampleStore(tmp_path, SETTINGS) as store:
        assert (("q1", 1) in store, ("q1", 2) in store) == (True, False)
        new = sampler(client, k=3).run([REQUEST], store)
    assert [result.sample for result in new] == [2] and len(client.calls) == 3
    rows = read_store(tmp_path)[1]
    assert sorted(row["sample"] for row in rows) == [0, 1, 2] and rows[0]["question_id"] == "q1"


def test_what_is_finished_survives_a_failing_server(tokenizer: Any, tmp_path: Path) -> None:
    client = FakeClient(tokenizer, lambda call: ConnectionError("server died") if call == 3 else "\\boxed{1}")
    with SampleStore(tmp_path, SETTINGS) as store, pytest.raises(ConnectionError):
        sampler(client, k=10, concurrency=1).run([REQUEST], store)
    assert sorted(row["sample"] for row in read_store(tmp_path)[1]) == [0, 1, 2]


def test_a_question_whose_prompt_changed_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with SampleStore(tmp_path, SETTINGS) as store:
        sampler(FakeClient(tokenizer)).run([REQUEST], store)
        changed = SampleRequest("q1", [{"role": "user", "content": "Work left to right mod 10: 7(a)+5"}])
        with pytest.raises(StoreError, match="question q1 was sampled from another prompt"):
            sampler(FakeClient(tokenizer)).run([changed], store)


def test_the_identity_holds_what_decides_a_sample(tokenizer: Any) -> None:
    def settings(k: int, temperature: float, kwargs: dict[str, Any]) -> dict[str, Any]:
        drawn = SamplingSettings(k=k, temperature=temperature)
        verifier = Verifier(judge, {"path": "v"})
        one = Sampler(FakeClient(tokenizer), tokenizer, drawn, verifier, template_kwargs=kwargs)
        return one.identity({"path": "m", "fingerprint": "f"})

    assert differences(settings(2, 1.0, {}), settings(8, 1.0, {})) == []
    changed = differences(settings(2, 1.0, {}), settings(2, 0.5, {"enable_thinking": False}))
    assert any("sampling.temperature" in line for line in changed)
    assert any("enable_thinking" in line for line in changed)
