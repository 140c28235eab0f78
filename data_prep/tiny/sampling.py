"""A batched sampler for the tiny model, and the accuracies that say whether a checkpoint is fit for use."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.tiny.contexts import question, reprompt, score
from data_prep.tiny.task import PoolSpec, derivation, make_pool
from verl_ext.verifiers.tiny_world import Problem

MAX_NEW_TOKENS = 48
LEFT_TO_SHRINK = 0.75  # share of running rows from which copying the rest of the cache pays
VARIATIONS = ("trailing_newlines", "blank_lines", "reworded")
ACCEPTED = {"base": (0.30, 0.45), "right_demonstration": (0.95, 1.0), "foreign_demonstration": (0.0, 0.20)}


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    user_turns: Sequence[str],
    *,
    given: Sequence[str] | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 512,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """One response per user turn; temperature 0 is greedy. The result depends on the seed, not on the global one.

    ``given`` is what the assistant turns already hold; the responses go on from there and do not repeat it.
    """
    model.eval()
    generator = torch.Generator(device=model.device).manual_seed(seed)
    prompt_ids = encode_prompts(tokenizer, user_turns, given)
    order = sorted(range(len(prompt_ids)), key=lambda i: (len(prompt_ids[i]), i))
    responses = [""] * len(prompt_ids)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids = _sample_batch(model, tokenizer, [prompt_ids[i] for i in rows], temperature, generator, max_new_tokens)
        for i, text in zip(rows, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            responses[i] = text
    return responses


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, user_turns: Sequence[str], given: Sequence[str] | None = None
) -> list[list[int]]:
    """Token ids of user turns with the assistant turn opened, and of what it already holds, tokenised by itself."""
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": turn}], tokenize=False, add_generation_prompt=True)
        for turn in user_turns
    ]
    prompt_ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    if given is None:
        return prompt_ids
    return [ids + tokenizer.encode(text, add_special_tokens=False) for ids, text in zip(prompt_ids, given, strict=True)]


def _sample_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    temperature: float,
    generator: torch.Generator,
    max_new_tokens: int,
) -> torch.Tensor:
    """Left-padded prompts, then one token at a time with the key-value cache.

    Rows that have ended leave the model's batch, but not the drawing: what a row draws depends on the seed and on its
    place among the prompts, whatever the others do.
    """
    width = max(map(len, prompt_ids))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    device = model.device
    tokens = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    done = torch.zeros(len(prompt_ids), dtype=torch.bool, device=device)
    running = torch.arange(len(prompt_ids), device=device)  # rows in the model's batch
    logits = torch.zeros(len(prompt_ids), len(tokenizer), device=device)
    cache, generated = None, []
    for _ in range(max_new_tokens):
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        logits[running] = output.logits[:, -1, : len(tokenizer)].float()
        if temperature > 0:
            chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        chosen = torch.where(done, pad, chosen)
        generated.append(chosen)
        done |= chosen == end
        if bool(done.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
        left = (~done[running]).nonzero()[:, 0]
        if len(left) <= LEFT_TO_SHRINK * len(running):
            running, mask, positions = running[left], mask[left], positions[left]
            cache.batch_select_indices(left)
        tokens = chosen[running, None]
    return torch.stack(generated, dim=1)


def varied_demonstrations(prompt: str, demonstration: str) -> dict[str, str]:
    """User turns with a demonstration that differ from SDPO's template as others in circulation do."""
    turns = (
        reprompt(prompt, demonstration + "\n\n") + "\n",
        reprompt(prompt + "\n", "\n" + demonstration),
        reprompt(prompt, demonstration).replace("Correct solution:", "A correct solution:"),
    )
    return dict(zip(VARIATIONS, turns, strict=True))


def accuracy(problems: Sequence[Problem], responses: Sequence[str]) -> float:
    """Share of right final answers."""
    return sum(score(p, r)["acc"] for p, r in zip(problems, responses, strict=True)) / len(problems)


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, questions: int = 240, samples: int = 4, seed: int = 0
) -> dict[str, float]:
    """Accuracies on held-out questions at T = 1, by what is in context.

    ``feedback`` and ``without_feedback`` are on the same rows: the questions whose first samples were wrong.
    """
    problems = make_pool(PoolSpec(questions, (1, 2, 3, 4, 5, 6), held_out=True, seed=seed)) * samples
    rng = random.Random(f"measure {seed}")
    prompts = [question(problem) for problem in problems]
    right = [derivation(problem, rng=rng) for problem in problems]
    foreign = [_foreign_demonstration(problem, problems, rng) for problem in problems]

    def respond(turns: list[str], offset: int) -> list[str]:
        return sample(model, tokenizer, turns, seed=seed * 1000 + offset)

    base = respond(prompts, 1)
    results = [score(p, r) for p, r in zip(problems, base, strict=True)]
    failed = [i for i, result in enumerate(results) if not result["acc"]]
    failed_problems = [problems[i] for i in failed]
    with_feedback = [reprompt(prompts[i], feedback=results[i]["feedback"]) for i in failed]
    with_both = [reprompt(prompts[i], right[i], results[i]["feedback"]) for i in failed]
    varied = [
        varied_demonstrations(prompt, demonstration) for prompt, demonstration in zip(prompts, right, strict=True)
    ]
    values = {
        "base": accuracy(problems, base),
        "base_strict": sum(score(p, r, "strict")["acc"] for p, r in zip(problems, base, strict=True)) / len(problems),
        "format": sum(result["format"] for result in results) / len(results),
        "base_trailing_newline": accuracy(problems, respond([p + "\n" for p in prompts], 2)),
        "right_demonstration": accuracy(problems, respond(list(map(reprompt, prompts, right)), 3)),
        **{
            f"right_demonstration_{name}": accuracy(problems, respond([turns[name] for turns in varied], 4 + i))
            for i, name in enumerate(VARIATIONS)
        },
        "foreign_demonstration": accuracy(problems, respond(list(map(reprompt, prompts, foreign)), 7)),
        "without_feedback": accuracy(failed_problems, respond([prompts[i] for i in failed], 8)),
        "feedback": accuracy(failed_problems, respond(with_feedback, 9)),
        "right_demonstration_and_feedback": accuracy(failed_problems, respond(with_both, 10)),
    }
    return {name: round(value, 4) for name, value in values.items()}


def _foreign_demonstration(problem: Problem, problems: Sequence[Problem], rng: random.Random) -> str:
    """A right solution of another question of the same level."""
    others = [other for other in problems if other.level == problem.level and other != problem]
    return derivation(rng.choice(others), rng=rng)
