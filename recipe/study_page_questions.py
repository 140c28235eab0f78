"""The questions of a study on its page: one table with the answers for each heading, and the details below it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipe.study_answers import Answer, answer
from recipe.study_conditions import EQUAL_BUDGETS, Conditions
from recipe.study_file import Study
from recipe.study_rows import markdown_table

HEAD = ("question", "answer", "difference", "95% interval", "about other", "p, seeds", "p, questions", "blind below")
CLAIMED = "claimed, power"

LEGEND = (
    "Difference: first minus second, in shares. Yes: the whole interval lies above the asked difference; no: none "
    "of it does. p: permutation tests of no difference, over seeds (for these questions) and over questions (for "
    "these runs). Blind below: a true difference smaller than this has less than 80% chance of a yes with as many "
    "seeds, by the variances seen here. Each question is tested on its own, without a correction for their number."
)
LEGEND_CLAIMED = (
    "Claimed, power: the effect that is claimed, on other models and other data, and the chance that as many seeds "
    "would show one as large here, by the same variances."
)
LEGEND_UNEQUAL = (
    "Unequal: the runs differ in more than the method, see below the table; a difference may come from that. Budgets "
    f"count as equal up to {EQUAL_BUDGETS:.0%}."
)


def questions_text(
    study: Study, rows: Mapping[str, Mapping[str, Any]], folder: Path, conditions: Mapping[str, Conditions]
) -> str:
    """The section, without its title; arguments of :func:`recipe.study_answers.answer`."""
    answers = [answer(study, rows, question, folder, conditions) for question in study.questions]
    numbered = list(enumerate(answers, 1))
    notes = [one.note for one in answers]
    # What is to be said of several answers is said once.
    shared = [note for note in dict.fromkeys(notes) if note and notes.count(note) > 1]
    letters = {note: chr(ord("a") + place) for place, note in enumerate(shared)}
    parts = [_overview(answers)]
    for group in dict.fromkeys(one.question.group for one in answers):
        own = [(number, one) for number, one in numbered if one.question.group == group]
        claimed = any(one.question.claimed is not None for _, one in own)
        head = [*HEAD, CLAIMED] if claimed else list(HEAD)
        body = [_cells(number, one, claimed) for number, one in own]
        parts += [f"### {group}"] if group else []
        parts += [
            markdown_table(head, body),
            "\n".join(f"{number}. {_detail(one, letters) + _interim(study, rows, one)}" for number, one in own),
        ]
    parts += ["\n".join(f"* Note {letter}: {note}." for note, letter in letters.items())] if letters else []
    legend = [LEGEND]
    legend += [LEGEND_CLAIMED] if any(one.question.claimed is not None for one in answers) else []
    legend += [LEGEND_UNEQUAL] if any(one.unequal for one in answers) else []
    return "\n\n".join([*parts, " ".join(legend)])


def _overview(answers: Sequence[Answer]) -> str:
    """How many of each answer, and how small an effect these runs can show."""
    counts = {verdict: sum(one.verdict == verdict for one in answers) for verdict in dict.fromkeys(_verdicts(answers))}
    text = f"{len(answers)} questions: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + "."
    if unequal := sum(bool(one.unequal) for one in answers):
        text += f" {unequal} of the answers compare runs at unequal conditions."
    blind = [one.blind_below for one in answers if one.blind_below is not None]
    if blind:
        text += f" Blind below a true difference of {min(blind):.3f} in the sharpest of them, {max(blind):.3f} in the"
        text += " bluntest."
    return text


def _verdicts(answers: Sequence[Answer]) -> list[str]:
    order = ("yes", "no", "not resolved", "not run", "refused")
    return [verdict for verdict in order if any(one.verdict == verdict for one in answers)]


def _cells(number: int, one: Answer, claimed: bool) -> list[str]:
    asked = f"{number}. {one.question.ask}"
    verdict = f"**{one.verdict}**" + (", unequal" if one.unequal else "")
    size = [_claimed(one)] if claimed else []
    if one.comparison is None:
        return [asked, verdict, *[""] * 6, *size]
    difference = one.comparison.difference
    return [
        asked,
        verdict,
        f"{difference.value:+.3f}",
        f"[{difference.low:+.3f}, {difference.high:+.3f}]",
        difference.population.replace("items", "questions"),
        _p_value(one.comparison.p_seeds),
        _p_value(one.comparison.p_items),
        "" if one.blind_below is None else f"{one.blind_below:.3f}",
        *size,
    ]


def _claimed(one: Answer) -> str:
    if one.question.claimed is None:
        return ""
    return f"{one.question.claimed:+.3f}, " + ("—" if one.power is None else f"{one.power:.0%}")


def _p_value(p: float | None) -> str:
    return "—" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def _detail(one: Answer, letters: Mapping[str, str]) -> str:
    question = one.question
    by = f" by more than {question.delta:g}" if question.delta else ""
    at = "" if question.step is None else f" at step {question.step}"
    at += "" if question.second_step is None else f" against step {question.second_step}"
    text = f"`{question.first}` above `{question.second}`{by}, {one.metric or question.metric}{at}"
    if one.seeds:
        text += f", {question.pairing} seed{'s' * (len(one.seeds) > 1)} {_listed(one.seeds)}"
        text += f" against {_listed(one.other_seeds)}" if one.other_seeds != one.seeds else ""
    if question.source:
        text += f". Claim: {question.source}"
    text += "."
    if one.unequal:
        text += f" Compared at different {'; different '.join(one.unequal)}."
    if one.note in letters:
        return f"{text} Note {letters[one.note]}."
    return text + (f" Note: {one.note}." if one.note else "")


def _interim(study: Study, rows: Mapping[str, Mapping[str, Any]], one: Answer) -> str:
    """An answer before all declared runs are there may still change, and looking often finds too much."""
    if one.verdict == "not run":
        return ""
    short = []
    for entry in dict.fromkeys((one.question.first, one.question.second)):
        declared = [run.run_id in rows for run in study.runs if run.entry == entry]
        if not all(declared):
            short.append(f"{sum(declared)} of {len(declared)} runs of `{entry}`")
    return f" Interim: {' and '.join(short)} are finished." if short else ""


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))
