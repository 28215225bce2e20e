"""Evaluation: loss and accuracy at every rank, as numbers, table and picture."""

from matryoshka_lora.evaluation.curve import Curve, Evaluation, evaluate_base, evaluate_ranks
from matryoshka_lora.data.questions import ExactMatch, Row, rows_from
from matryoshka_lora.evaluation.report import (
    accuracy_table,
    compare,
    draw,
    in_words,
    loss_table,
    print_tables,
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
    "in_words",
    "loss_table",
    "print_tables",
    "rows_from",
    "score",
    "write_evaluation",
]
