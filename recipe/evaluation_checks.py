"""What must hold for the questions of an evaluation before anything is drawn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from omegaconf import DictConfig

from data_prep.validation.verifiers import gold_response_of
from verl_ext.config import ConfigError
from verl_ext.sampling import SampleRequest
from verl_ext.verification import Verdict, Verifier
from verl_ext.verifier_config import POOLED, check_function, verifier_config

NAMED = 5
"""Questions that a message names."""
PUT_BEFORE = 32
"""Right answers of a data source that the verifier is shown."""


def check_answers(requests: Sequence[SampleRequest], key: str) -> None:
    """Every question has a right answer. Raises ConfigError naming those without; ``key`` names the files."""
    without = [request.question_id for request in requests if request.ground_truth in (None, "")]
    if without:
        named = ", ".join(without[:NAMED]) + (" ..." if len(without) > NAMED else "")
        raise ConfigError(
            f"{key}: {len(without)} of {len(requests)} questions have no answer (reward_model.ground_truth): {named}; "
            "leave them out of the file"
        )


def check_verifier(config: DictConfig, requests: Sequence[SampleRequest], key: str) -> None:
    """The verifier accepts the data's own right answers, of up to 32 questions of each data source.

    What a right response is, `python -m data_prep.validate` says: ``gold_response`` of the verifier's module, else the
    row's demonstration or solution, else its ground truth. Single rows may be broken, so a verifier is refused where it
    accepts less than half. A reward function of one's own (``reward.custom_reward_function``) is not asked.

    Raises:
        ConfigError: the verifier cannot work here, or is not for these data; names the data source.
    """
    settings = verifier_config(config.verifier)
    own = config.reward.custom_reward_function.path
    if settings.function is None or (own and str(own) != str(POOLED)):
        return
    check_function(settings)
    gold_response = gold_response_of(settings.function)
    verifier = Verifier.from_config(config, workers=max(1, settings.processes))
    try:
        for source in sorted({str(request.data_source) for request in requests}):
            asked = [
                (request, text)
                for request in _spread([one for one in requests if str(one.data_source) == source])
                if isinstance(text := _response(gold_response, request), str)
            ]
            verdicts = asyncio.run(_judge(verifier, asked))
            refused = [i for i, verdict in enumerate(verdicts) if verdict.status != "ok" or verdict.acc != 1.0]
            if 2 * len(refused) > len(asked):
                request, verdict = asked[refused[0]][0], verdicts[refused[0]]
                said = verdict.error or verdict.feedback or f"scored {verdict.score:g}"
                raise ConfigError(
                    f"{settings.function} is not for the data source {source!r} of {key}: it accepts the right answer "
                    f"of {len(asked) - len(refused)} of {len(asked)} questions; {request.question_id}: {said[:200]}. "
                    "Give the verifier of this data (data=PRESET or verifier.function); "
                    "evaluation.check_gold=false goes without this check"
                )
    finally:
        verifier.close()


def _spread(requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """Evenly over all, because files are often sorted."""
    many = len(requests)
    return [requests[i * many // PUT_BEFORE] for i in range(PUT_BEFORE)] if many > PUT_BEFORE else list(requests)


def _response(gold_response: object, request: SampleRequest) -> str | None:
    """None where there is none. A function that raises has found a row that it cannot read: a wrong answer to it."""
    assert callable(gold_response)
    try:
        return gold_response(request.ground_truth, dict(request.extra_info))
    except Exception:  # of a verifier given another data set's answer; the empty response is then refused by name
        return ""


async def _judge(verifier: Verifier, asked: Sequence[tuple[SampleRequest, str]]) -> list[Verdict]:
    calls = [
        verifier(
            data_source=request.data_source,
            solution_str=text,
            ground_truth=request.ground_truth,
            extra_info=request.extra_info,
        )
        for request, text in asked
    ]
    return list(await asyncio.gather(*calls))
