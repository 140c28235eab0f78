"""The work of `python -m recipe.srt collect`: two rounds of sampling, traces, training rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from recipe.console import RunConsole
from recipe.drawing import Drawer
from recipe.srt_attempts import BRANCHES, RIGHT, UNJUDGED, WRONG, RevisionPlan, is_right, plan_revisions
from recipe.srt_counts import by_branch, dropped, listed, table, totals
from recipe.srt_files import write_files
from recipe.srt_rows import JOINT_FILE, PLAIN, RowFiles, TraceTokenizer, plain_rows, trace_rows
from recipe.srt_settings import SrtConfig
from recipe.srt_traces import Collected, choose_traces
from verl_ext.reference_text import SpecialTokens
from verl_ext.revision import Phrases, check_continuation, turn_prefix
from verl_ext.sample_store import MANIFEST, SampleStore, StoreError, read_manifest
from verl_ext.sampling import SampleRequest
from verl_ext.sampling_prompts import PromptError

ATTEMPTS, REVISIONS = "attempts", "revisions"


def stores_in(folder: Path) -> list[Path]:
    """The stores that a collection has made so far."""
    return [folder / name for name in (ATTEMPTS, REVISIONS) if (folder / name / MANIFEST).exists()]


class Collection:
    """One call of :func:`recipe.srt.collect`."""

    def __init__(
        self,
        config: DictConfig,
        block: SrtConfig,
        phrases: Phrases | None,
        questions: list[SampleRequest],
        folder: Path,
        screen: RunConsole,
    ) -> None:
        self.config, self.block, self.phrases = config, block, phrases
        self.questions, self.folder, self.screen = questions, folder, screen
        self.threshold = float(config.distill.context.success_threshold)
        self.drawn = 0

    def run(self) -> dict[str, Any]:
        """The counts; what was drawn stays in the stores whatever happens. Raises as :func:`recipe.srt.collect`."""
        block = self.block
        with Drawer(
            self.config,
            checkpoint=None,  # its weights are in place already
            verify_workers=block.verify_workers,
            concurrency=block.concurrency,
        ) as drawer:
            special_token = SpecialTokens(drawer.tokenizer).first_in
            self._check_turn(drawer)
            with self._open_stores(drawer) as (attempts, revisions):
                plan = self._attempts(drawer, attempts, special_token)
                if revisions is None:
                    collected = Collected()
                else:
                    self._check_attempts(plan)
                    collected = self._revisions(drawer, revisions, plan, special_token)
            tokenizer, template_kwargs = drawer.tokenizer, drawer.template_kwargs
        counts = totals(len(self.questions), plan, collected)
        if self.phrases is not None:
            counts |= dropped(plan, collected)
        if not block.write:
            return counts | {"files": [], "drawn": self.drawn}
        self._check_traces(plan, collected)
        if self.phrases is None:
            rows = self._plain_rows(tokenizer, template_kwargs, special_token)
        else:
            maker = TraceTokenizer(tokenizer, self.phrases, block.placement, template_kwargs)
            rows = trace_rows(
                collected.traces,
                maker,
                block.losses,
                generation_rows=block.generation_rows,
                revision_rows=block.revision_rows,
                max_length=block.max_length,
            )
        counts |= {
            "rows": sum(map(len, rows.files.values())),
            "dropped_rows_too_long": rows.too_long.total(),
            **{f"dropped_attempts_{reason}": count for reason, count in rows.left_out.items()},
        }
        facts = self._facts(counts, plan, collected, rows)
        traces = None if self.phrases is None else collected.traces
        files = write_files(self.folder, traces, rows.files, facts)
        if self.phrases is not None:
            self.screen.text(table(plan, collected))
        self.screen.note(f"{counts['rows']} rows: {', '.join(map(str, files))}")
        return counts | {"files": [str(file) for file in files], "drawn": self.drawn}

    # ---------------------------------------------------------------------------------------------------- the rounds

    def _check_turn(self, drawer: Drawer) -> None:
        """Whether the model's assistant turn can hold an attempt and the phrases. Raises PromptError."""
        if self.phrases is None:
            return
        messages = self.questions[0].messages
        check_continuation(drawer.tokenizer, drawer.template_kwargs, messages=messages)
        for branch in self.block.branches:
            try:
                drawer.prompts("of the check", messages, turn_prefix("2", self.phrases.of(branch == RIGHT)))
            except PromptError as error:  # a small vocabulary may lack a phrase's letters
                raise PromptError(f"distill.context.phrase_{branch} does not suit the model: {error}") from error

    @contextmanager
    def _open_stores(self, drawer: Drawer) -> Iterator[tuple[SampleStore, SampleStore | None]]:
        """Both before anything is drawn, so that a phrase that was changed does not cost a round of attempts first."""
        block, limit = self.block, self.config.data.max_response_length
        with ExitStack() as stack:
            attempts = stack.enter_context(drawer.store(self.folder / ATTEMPTS, block.attempt_sampling(limit)))
            if self.phrases is None:
                yield attempts, None
                return
            more = {
                "revision": {"phrases": asdict(self.phrases), "threshold": self.threshold, ATTEMPTS: attempts.key},
            }
            settings = block.revision_sampling(limit)
            yield attempts, stack.enter_context(drawer.store(self.folder / REVISIONS, settings, more))

    def _attempts(self, drawer: Drawer, store: SampleStore, special_token: Callable[[str], str | None]) -> RevisionPlan:
        block, limit = self.block, self.config.data.max_response_length
        self.drawn += drawer.draw(self.questions, block.attempt_sampling(limit), store, self.screen)
        return plan_revisions(
            self.questions,
            store.rows(),
            attempts=block.attempts,
            threshold=self.threshold,
            phrases=self.phrases,
            branches=block.branches if block.revisions else (),
            prompts=drawer.prompts,
            max_tokens=block.revision_sampling(limit).max_tokens if block.revisions else 0,
            max_model_len=drawer.max_model_len,
            special_token=special_token,
        )

    def _revisions(
        self, drawer: Drawer, store: SampleStore, plan: RevisionPlan, special_token: Callable[[str], str | None]
    ) -> Collected:
        block, before = self.block, plan.judged.total()
        self.screen.total_steps = before + len(plan.attempts) * block.revisions
        self.screen.phase(f"{len(plan.attempts)} attempts x {block.revisions} revisions")
        settings = block.revision_sampling(self.config.data.max_response_length)
        self.drawn += drawer.draw(plan.requests, settings, store, self.screen, before=before)
        return choose_traces(
            plan,
            store.rows(),
            self.phrases,
            revisions=block.revisions,
            threshold=self.threshold,
            special_token=special_token,
            judge=lambda texts: self._judge(drawer, texts),
            per_attempt=block.per_attempt,
            max_traces=block.max_traces,
        )

    def _judge(self, drawer: Drawer, texts: Sequence[tuple[SampleRequest, str]]) -> list[bool | None]:
        """Right or not by the run's verifier, as many at a time as in sampling."""

        async def judge_all() -> list[Any]:
            places = asyncio.Semaphore(self.block.verify_workers)

            async def one(question: SampleRequest, text: str) -> Any:
                async with places:
                    return await drawer.verifier(
                        data_source=question.data_source,
                        solution_str=text,
                        ground_truth=question.ground_truth,
                        extra_info=question.extra_info,
                    )

            return await asyncio.gather(*(one(question, text) for question, text in texts))

        return [is_right(asdict(verdict), self.threshold) for verdict in asyncio.run(judge_all())]

    # -------------------------------------------------------------------------------------------------- what is missing

    def _check_attempts(self, plan: RevisionPlan) -> None:
        """Before any revision is drawn. Raises StoreError for a branch without an attempt."""
        for branch in self.block.branches:
            if self.block.write and not plan.revised(branch):
                reasons = listed(plan.left_out, (branch, UNJUDGED))
                room = (
                    "; those without room: set srt.revision_max_tokens lower or actor_rollout_ref.rollout.max_model_len"
                    " higher" * bool(plan.left_out[branch, "no_room"])
                )
                right, wrong, unjudged = (plan.judged[name] for name in (RIGHT, WRONG, UNJUDGED))
                raise StoreError(
                    f"{self.folder / ATTEMPTS} holds no {branch} attempt to revise: of {plan.judged.total()} attempts "
                    f"at {len(self.questions)} questions {right} are right, {wrong} wrong and {unjudged} not judged; "
                    f"left out: {reasons}{room}. {self._advice(branch)}"
                )

    def _check_traces(self, plan: RevisionPlan, collected: Collected) -> None:
        """Raises StoreError for a branch without a trace."""
        if self.phrases is None:
            return
        for branch in self.block.branches:
            if not collected.count(branch):
                raise StoreError(
                    f"{self.folder / REVISIONS} holds no trace of a {branch} attempt: {plan.revised(branch)} {branch} "
                    f"attempts have {collected.revisions[branch]} revisions, {collected.right[branch]} of them right; "
                    f"left out: {listed(collected.left_out, (branch,))}. {self._advice(branch)}"
                )

    def _advice(self, branch: str) -> str:
        other = BRANCHES[1 - BRANCHES.index(branch)]
        without = f", or srt.revise_{branch}=false to train on {other} attempts alone" * (len(self.block.branches) > 1)
        if branch == WRONG and self.block.losses == "two_stage":
            without += " (which srt.losses=two_stage does not allow)" * bool(without)
        return (
            f"Set srt.limit={self.block.limit}, srt.attempts={self.block.attempts} or srt.revisions="
            f"{self.block.revisions} higher{without}; what was drawn is kept, and the same command goes on"
        )

    # ------------------------------------------------------------------------------------------------- what is written

    def _plain_rows(
        self, tokenizer: Any, template_kwargs: Mapping[str, Any], special_token: Callable[[str], str | None]
    ) -> RowFiles:
        rows, chosen, too_long = plain_rows(
            self.folder / ATTEMPTS,
            self.questions,
            tokenizer,
            template_kwargs=template_kwargs,
            samples=self.block.attempts,
            threshold=self.threshold,
            per_question=self.block.per_question,
            special_token=special_token,
            max_length=self.block.max_length,
        )
        if not rows:
            reasons = ", ".join(f"{fault} {count}" for fault, count in chosen.left_out.items() if count)
            raise StoreError(
                f"{self.folder / ATTEMPTS} holds no attempt to train on: {chosen.samples} attempts, left out: "
                f"{reasons or 'none'}, longer than srt.max_length={self.block.max_length}: {too_long}. Set srt.limit, "
                "srt.attempts or srt.max_length higher; what was drawn is kept"
            )
        files = RowFiles({JOINT_FILE: rows})
        files.too_long[PLAIN] = too_long
        files.left_out.update(chosen.left_out)
        return files

    def _facts(
        self, counts: Mapping[str, Any], plan: RevisionPlan, collected: Collected, rows: RowFiles
    ) -> dict[str, Any]:
        """What the manifest says beside the files."""
        stores = {store.name: _identity(store) for store in stores_in(self.folder)}
        return {
            "made_by": "python -m recipe.srt collect",
            "settings": asdict(self.block),
            "phrases": None if self.phrases is None else asdict(self.phrases),
            "success_threshold": self.threshold,
            "stores": stores,
            "counts": dict(counts),
            "branches": by_branch(plan, collected),
            "unjudged_attempts": plan.judged[UNJUDGED],
            "rows_too_long": dict(rows.too_long),
            "rows_left_out": dict(rows.left_out),
        }


def _identity(store: Path) -> dict[str, Any]:
    held = read_manifest(store)
    return {"key": held["key"], "settings": held["settings"]}
