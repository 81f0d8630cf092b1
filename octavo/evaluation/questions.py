"""Multiple-choice questions in the CSV layout of MMLU, and its subjects' categories.

The layout: ``dev/SUBJECT_dev.csv`` and ``test/SUBJECT_test.csv``, rows of question, four choices and the
answer's letter, without a header (https://github.com/hendrycks/test).
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from octavo.errors import OctavoError, one_line

LETTERS = ("A", "B", "C", "D")

# The table of the original's categories.py.
CATEGORIES = {
    "STEM": {
        "abstract_algebra", "astronomy", "college_biology", "college_chemistry",
        "college_computer_science", "college_mathematics", "college_physics", "computer_security",
        "conceptual_physics", "electrical_engineering", "elementary_mathematics",
        "high_school_biology", "high_school_chemistry", "high_school_computer_science",
        "high_school_mathematics", "high_school_physics", "high_school_statistics",
        "machine_learning",
    },
    "humanities": {
        "formal_logic", "high_school_european_history", "high_school_us_history",
        "high_school_world_history", "international_law", "jurisprudence", "logical_fallacies",
        "moral_disputes", "moral_scenarios", "philosophy", "prehistory", "professional_law",
        "world_religions",
    },
    "social sciences": {
        "econometrics", "high_school_geography", "high_school_government_and_politics",
        "high_school_macroeconomics", "high_school_microeconomics", "high_school_psychology",
        "human_sexuality", "professional_psychology", "public_relations", "security_studies",
        "sociology", "us_foreign_policy",
    },
    "other": {
        "anatomy", "business_ethics", "clinical_knowledge", "college_medicine", "global_facts",
        "human_aging", "management", "marketing", "medical_genetics", "miscellaneous", "nutrition",
        "professional_accounting", "professional_medicine", "virology",
    },
}  # fmt: skip


class Question(NamedTuple):
    """A question, its four choices and the letter of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: str


class Subject(NamedTuple):
    """A subject's questions.

    Attributes:
        name: as in the file names.
        shots: solved questions that are shown first.
        questions: to answer.
    """

    name: str
    shots: list[Question]
    questions: list[Question]

    @property
    def category(self) -> str:
        """A key of :data:`CATEGORIES`; ``other`` for a subject that is not in the table."""
        found = [name for name, members in CATEGORIES.items() if self.name in members]
        return found[0] if found else "other"


def load_subjects(
    directory: Path, *, shots: int, limit: int | None = None, only: list[str] | None = None
) -> list[Subject]:
    """The subjects in ``directory``, by name.

    Args:
        directory: with ``test`` and, where there are to be shots, ``dev``.
        shots: solved questions of each subject, the first ones of its ``dev`` file.
        limit: questions of each subject, the first ones of its ``test`` file; all by default.
        only: the subjects wanted; all by default.

    Raises:
        OctavoError: a file is missing, empty or malformed, a subject is not there, or an option is
            impossible.
    """
    if shots < 0 or (limit is not None and limit < 1):
        raise OctavoError(
            f"--shots {shots} and --limit {limit}: expected no shots or more, and a limit of at least 1."
        )
    found = {
        path.name.removesuffix("_test.csv"): path
        for path in sorted(directory.glob("test/*_test.csv"))
    }
    if not found:
        raise OctavoError(
            f"{directory} has no file test/SUBJECT_test.csv. Expected the layout of MMLU: "
            "test/SUBJECT_test.csv and dev/SUBJECT_dev.csv."
        )
    unknown = [name for name in only or [] if name not in found]
    if unknown:
        raise OctavoError(
            f"{directory / 'test'} has no subject {', '.join(unknown)}. It has {', '.join(found)}."
        )
    subjects = []
    for name in only or found:
        solved = _read(directory / "dev" / f"{name}_dev.csv") if shots else []
        if len(solved) < shots:
            raise OctavoError(
                f"{directory / 'dev' / f'{name}_dev.csv'} holds {len(solved)} questions, "
                f"--shots asks for {shots}. Choose at most {len(solved)}."
            )
        subjects.append(Subject(name, solved[:shots], _read(found[name])[:limit]))
    return subjects


def _read(path: Path) -> list[Question]:
    if not path.is_file():
        raise OctavoError(f"{path} does not exist. Expected the layout of MMLU, or --shots 0.")
    questions, line = [], 1
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, strict=True)
            for row in rows:
                # A blank line is no row.
                if row:
                    questions.append(_question(row, f"{path}, line {line}"))
                # A row may go over several lines; the reader counts those it has read.
                line = rows.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        raise OctavoError(f"{path}, line {line} is not CSV: {one_line(error)}.") from error
    if not questions:
        raise OctavoError(f"{path} holds no questions.")
    return questions


def _question(row: list[str], place: str) -> Question:
    if len(row) != 2 + len(LETTERS):
        raise OctavoError(
            f"{place} has {len(row)} fields, expected 6: question, four choices, the answer's letter. "
            "Quote fields that hold commas."
        )
    text, *choices, answer = row
    if answer not in LETTERS:
        raise OctavoError(f"{place} gives the answer {answer!r}, expected A, B, C or D.")
    return Question(text, tuple(choices), answer)
