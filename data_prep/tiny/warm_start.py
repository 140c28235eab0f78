"""The warm start: a Qwen3-architecture model of 0.46 million parameters, trained on the noisy worker's answers.

The same seed, machine and thread count give the same bytes; elsewhere the floating-point sums differ, and the
accuracies agree within a few points.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from data_prep.schema import write_json
from data_prep.tiny.contexts import Example
from data_prep.tiny.flavours import FLAVOURS, random_example
from data_prep.tiny.task import WORLD_SEED
from data_prep.tiny.tokenizer import MAX_POSITIONS, VOCAB_SIZE, build_tokenizer

IGNORED = -100


@dataclass(frozen=True)
class WarmStart:
    """Settings of a warm start; the defaults make the shipped checkpoint."""

    flavour: str = "plain"
    steps: int = 1400
    batch_size: int = 64
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    final_rate: float = 0.05  # share of the learning rate left at the end of the cosine
    weight_decay: float = 0.01
    clip: float = 1.0
    error_scale: float = 1.0  # of the noisy worker: above 1 the model starts out worse
    seed: int = 0
    threads: int = 2
    batches_per_bucket: int = 20  # examples are sorted by length within so many batches, to waste little on padding


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """A freshly initialised model; the large initialisation is part of the recipe (with .02 it learns far less)."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        num_hidden_layers=3,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.06,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config).to(torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    return model


class Encoded(NamedTuple):
    """Token ids of an example, and the same as labels, IGNORED where nothing is trained."""

    tokens: list[int]
    labels: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, examples: list[Example]) -> list[Encoded]:
    """The examples as tokens, each with the end token; prompt, given text and response are tokenised by themselves."""
    conversations = [example.messages for example in examples]
    prompts = tokenizer.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
    responses = [example.response + tokenizer.eos_token for example in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    given_ids = tokenizer([example.given for example in examples], add_special_tokens=False)["input_ids"]
    written = tokenizer(responses, add_special_tokens=False, return_offsets_mapping=True)
    encoded = []
    for example, prompt, given, response, offsets in zip(
        examples, prompt_ids, given_ids, written["input_ids"], written["offset_mapping"], strict=True
    ):
        labels = [IGNORED] * (len(prompt) + len(given)) + [
            IGNORED if any(first < end and start < last for first, last in example.untrained) else token
            for token, (start, end) in zip(response, offsets, strict=True)
        ]
        encoded.append(Encoded(prompt + given + response, labels))
    return encoded


def batches(settings: WarmStart, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches (tokens, labels) of fresh examples of about the same length, padded on the right."""
    flavour = FLAVOURS[settings.flavour]
    rng = random.Random(f"warm start {settings.flavour} {settings.seed}")
    while True:
        count = settings.batch_size * settings.batches_per_bucket
        encoded = encode(tokenizer, [random_example(flavour, rng, settings.error_scale) for _ in range(count)])
        encoded.sort(key=lambda row: len(row.tokens))
        starts = list(range(0, count, settings.batch_size))
        rng.shuffle(starts)
        for start in starts:
            rows = encoded[start : start + settings.batch_size]
            width = max(len(row.tokens) for row in rows)
            tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
            labels = torch.full((len(rows), width), IGNORED)
            for i, row in enumerate(rows):
                tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
                labels[i, : len(row.labels)] = torch.tensor(row.labels)
            yield tokens, labels


def rate_factor(step: int, settings: WarmStart) -> float:
    """Linear warm-up, then a cosine down to ``final_rate``."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


def token_weights(settings: WarmStart, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    """Weight of every token in the loss, [VOCAB_SIZE]; None where all count the same."""
    given = FLAVOURS[settings.flavour].token_weights
    if not given:
        return None
    weights = torch.ones(VOCAB_SIZE)
    for token, weight in given.items():
        weights[tokenizer.convert_tokens_to_ids(token)] = weight
    return weights


def train(
    settings: WarmStart,
    *,
    progress: bool = True,
    on_step: Callable[[int, Qwen3ForCausalLM], None] | None = None,
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """Train from scratch; the loss covers the response only, without its untrained parts."""
    if settings.flavour not in FLAVOURS:
        raise ValueError(f"flavour {settings.flavour!r} is unknown; expected one of {sorted(FLAVOURS)}")
    threads_before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        tokenizer = build_tokenizer(FLAVOURS[settings.flavour].extra_pieces)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = build_model(tokenizer)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_factor(step, settings))
        model.train()
        data = batches(settings, tokenizer)
        weights = token_weights(settings, tokenizer)
        bar = tqdm(range(settings.steps), desc=f"warm start ({settings.flavour})", unit="step", disable=not progress)
        average = None
        for step in bar:
            tokens, labels = next(data)
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, logits.shape[-1]),
                labels[:, 1:].reshape(-1),
                weight=weights,
                ignore_index=IGNORED,
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            if step % 10 == 0:
                bar.set_postfix(loss=f"{average:.3f}")
            if on_step is not None:
                on_step(step + 1, model)
    finally:
        torch.set_num_threads(threads_before)
    return model.eval(), tokenizer


def save(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    settings: WarmStart,
    accuracies: dict[str, float],
) -> Path:
    """Write the checkpoint as transformers, vLLM and verl load it; the manifest comes last and holds no date."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # the weights come out readable by their owner only
        file.chmod(0o644)
    manifest: dict[str, Any] = {
        "settings": asdict(settings),
        "world_seed": WORLD_SEED,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "accuracies": accuracies,
    }
    write_json(manifest, folder / "manifest.json")
    return folder
