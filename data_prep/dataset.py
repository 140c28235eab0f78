"""What a data set declares: where it is, how a row of it becomes questions, which prompts it has."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from data_prep.prompts import Preset
from data_prep.records import Record, RowError
from data_prep.sources import Hub

# In every data set, beside split, index and question_id.
COMMON_FIELDS = {"problem": pa.string(), "solution": pa.string(), "demonstration": pa.string()}
OUTPUT_SPLITS = ("train", "test")


@dataclass
class Draft:
    """A question on its way to a row.

    Args:
        fields: what the prompt's template asks for. ``problem``, where it is there, is also the bare question in
            ``extra_info.problem``; a question that says too little alone (without its options, without the tools'
            documentation) goes by another name.
        ground_truth: what the verifier compares with.
        solution: the reference solution's text, "" where the source has none.
        demonstration: a worked response in the form the prompt asks for, "" where there is none.
        extra: the data set's own fields of ``extra_info``, exactly those of :attr:`DataSet.extra_fields`.
        split: ``train`` or ``test``; "" for the split its record was read from.
        key: rows with a key that an earlier row of the same split had are left out and counted; None: never.
        messages: a prompt that is taken as it is, instead of the preset's.
        left_out: the reason for leaving the row out, set by ``convert`` or :attr:`DataSet.arrange`; "" otherwise.
        where: file and row of its record; set by the preparation.
    """

    fields: Mapping[str, str]
    ground_truth: str
    solution: str = ""
    demonstration: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    split: str = ""
    key: str | None = None
    messages: list[dict[str, str]] | None = None
    left_out: str = ""
    where: str = ""


@dataclass(frozen=True)
class Settings:
    """What the command line chose: the prompt, the seed (None where the data set draws nothing), its own options."""

    prompt: Preset
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """One data set.

    Args:
        name: of the command and of the rows' ``data_source``.
        about: for ``--help``: what it is, what is left out, which splits come out.
        hub: its home on the hub; one without a name where there is none, then ``--source`` must be given.
        convert: makes one draft, or several, of a record. Raises RowError (mostly through the record's accessors)
            where the record is broken, LeftOut where it is not taken on purpose; where a record holds several
            questions, a RowError may stand among the drafts in the place of a broken one.
        prompts: presets by name, the first is the default.
        verifier: import path of the verifier that fits, ``package.module:function``.
        ability: the column of that name.
        extra_fields: the Arrow types of its own fields of ``extra_info``.
        arrange: sees all drafts, in the order of reading, and may set their ``split`` and ``left_out``; returns them
            in the order they are to be written in.
        all_files: see :func:`data_prep.sources.open_source`.
        columns: where given, only these columns of hub tables are read.
        seed: the default of ``--seed``; None: nothing is drawn, there is no such option.
        add_options: adds the data set's own options to the parser.
        parts: for a command that writes several data sets: folder below ``--out`` ("" for itself) -> data set.
        facts: adds to the manifest what is known only from the drafts; its ``notes`` are also shown.
    """

    name: str
    about: str
    hub: Hub
    convert: Callable[[Record, Settings], Draft | Sequence[Draft | RowError]]
    prompts: Mapping[str, Preset]
    verifier: str
    ability: str = "math"
    extra_fields: Mapping[str, pa.DataType] = field(default_factory=dict)
    arrange: Callable[[list[Draft], Settings], list[Draft]] | None = None
    all_files: bool = False
    columns: Sequence[str] | None = None
    seed: int | None = None
    add_options: Callable[[argparse.ArgumentParser], None] | None = None
    parts: Callable[[Mapping[str, Any]], Mapping[str, DataSet]] | None = None
    facts: Callable[[list[Draft], Settings], Mapping[str, Any]] | None = None
