"""Evaluation: loss and accuracy at every rank, as numbers, table and picture."""

from matryoshka_lora.evaluation.curve import Curve, Evaluation, evaluate_base, evaluate_ranks
from matryoshka_lora.data.questions import ExactMatch, Row, rows_from
from matryoshka_lora.evaluation.report import (
    accuracy_table,
    compare,
    draw,
    loss_table,
    print_tables,
    reading,
    write_evaluation,
)
from matryoshka_lora.evaluation.scoring import Scores, score

__all__ = [
    "Curve",
    "Evaluation",
    "ExactMatch",
    "Row",
    "Scores",
    "accuracy_table",
    "compare",
    "draw",
    "evaluate_base",
    "evaluate_ranks",
    "loss_table",
    "print_tables",
    "reading",
    "rows_from",
    "score",
    "write_evaluation",
]
