"""The model card's data sets as `hf download` leaves them: the same folders, columns and types, other questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
from lm_eval.tasks import TaskManager
from pyarrow import parquet

from qmix.evaluate.tasks import THEIR_TASKS

THINGS = ("menu", "button", "window", "file", "page", "printer", "cursor", "list")
ACTIONS = ("open", "close", "select", "print", "delete", "move", "save", "find")


def write_card(data: Path, test: int = 2) -> Path:
    """`test` questions of each task (of each subject for MMLU), and as many examples as their prompts take."""
    rows = [_question(index) for index in range(40)]
    exam, examples = rows[:test], rows[test:]
    _write(data, "allenai/ai2_arc", "ARC-Challenge", train=map(_arc, examples), test=map(_arc, exam))
    _write(data, "Rowan/hellaswag", "data", train=map(_hellaswag, examples), validation=map(_hellaswag, exam))
    for subject in subjects():
        _write(data, "cais/mmlu", subject, dev=map(_mmlu, examples[:5]), test=map(_mmlu, exam))
    _write(data, "truthfulqa/truthful_qa", "multiple_choice", validation=map(_truthfulqa, exam))
    _write(
        data, "allenai/winogrande", "winogrande_xl", train=map(_winogrande, examples), validation=map(_winogrande, exam)
    )
    _write(data, "openai/gsm8k", "main", train=map(_gsm8k, examples), test=map(_gsm8k, exam))
    return data


def subjects() -> list[str]:
    """MMLU's, as the harness names them."""
    index = TaskManager(include_path=str(THEIR_TASKS / "mmlu" / "default"), include_defaults=False).task_index
    return sorted(entry.cfg["dataset_name"] for entry in index.values() if entry.cfg and "dataset_name" in entry.cfg)


def _write(data: Path, path: str, folder: str, **splits: Any) -> None:
    place = data / path / folder
    place.mkdir(parents=True)
    for split, rows in splits.items():
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), place / f"{split}-00000-of-00001.parquet")


def _question(index: int) -> dict[str, Any]:
    """Return a question about a thing; which of four answers is right follows from the index."""
    action, thing = ACTIONS[index % 8], THINGS[index * 3 % 8]
    right = index % 4
    answers = [f"{action} the {THINGS[(index + place) % 8]}" for place in range(4)]
    return {"question": f"How do I {action} the {thing} {index}?", "answers": answers, "right": right, "index": index}


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    choices = {"text": row["answers"], "label": ["A", "B", "C", "D"]}
    return {"id": str(row["index"]), "question": row["question"], "choices": choices, "answerKey": "ABCD"[row["right"]]}


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "ind": row["index"], "activity_label": "Using a computer", "ctx_a": row["question"], "ctx_b": "the user will",
        "ctx": "", "endings": row["answers"], "source_id": "", "split": "", "split_type": "",
        "label": str(row["right"]),
    }  # fmt: skip


def _mmlu(row: dict[str, Any]) -> dict[str, Any]:
    return {"question": row["question"], "subject": "", "choices": row["answers"], "answer": row["right"]}


def _truthfulqa(row: dict[str, Any]) -> dict[str, Any]:
    labels = [int(place == row["right"]) for place in range(4)]
    targets = {"choices": row["answers"], "labels": labels}
    return {"question": row["question"], "mc1_targets": targets, "mc2_targets": targets}


def _winogrande(row: dict[str, Any]) -> dict[str, Any]:
    first, second = row["answers"][:2]
    right = str(1 + row["right"] % 2)
    return {
        "sentence": f"To {first}, click _ in step {row['index']}.",
        "option1": first,
        "option2": second,
        "answer": right,
    }


def _gsm8k(row: dict[str, Any]) -> dict[str, Any]:
    count = row["index"] + 2
    text = f"{count} pages and {count} pages are {2 * count} pages.\n#### {2 * count}"
    return {"question": f"A printer prints {count} pages twice. How many?", "answer": text}
