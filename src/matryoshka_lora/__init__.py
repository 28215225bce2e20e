"""Train one LoRA adapter, deploy it at any rank (MatryoshkaLoRA, arXiv 2605.07850)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matryoshka_lora.errors import MatryoshkaError as MatryoshkaError
    from matryoshka_lora.errors import MissingDependencyError as MissingDependencyError
    from matryoshka_lora.errors import NotFiniteError as NotFiniteError
    from matryoshka_lora.evaluation.evaluate import evaluate as evaluate
    from matryoshka_lora.evaluation.folder import FolderEvaluation as FolderEvaluation
    from matryoshka_lora.evaluation.folder import evaluate_folder as evaluate_folder
    from matryoshka_lora.evaluation.preview import Preview as Preview
    from matryoshka_lora.evaluation.preview import preview as preview
    from matryoshka_lora.evaluation.results import Evaluation as Evaluation
    from matryoshka_lora.evaluation.results import aurac as aurac
    from matryoshka_lora.evaluation.select import Selection as Selection
    from matryoshka_lora.evaluation.select import select as select
    from matryoshka_lora.extraction.extract import ExtractResult as ExtractResult
    from matryoshka_lora.extraction.extract import extract as extract
    from matryoshka_lora.formats.open import open as open
    from matryoshka_lora.lora.layer import Factors as Factors
    from matryoshka_lora.lora.layer import Layer as Layer
    from matryoshka_lora.lora.lora import Lora as Lora
    from matryoshka_lora.lora.results import ReorderResult as ReorderResult
    from matryoshka_lora.lora.results import TrainRanksResult as TrainRanksResult
    from matryoshka_lora.lora.save import SaveResult as SaveResult
    from matryoshka_lora.nesting import Nesting as Nesting
    from matryoshka_lora.operations.combine import CombineResult as CombineResult
    from matryoshka_lora.operations.combine import combine as combine
    from matryoshka_lora.operations.export import ExportFolderResult as ExportFolderResult
    from matryoshka_lora.operations.export import ExportOptions as ExportOptions
    from matryoshka_lora.operations.export import ExportResult as ExportResult
    from matryoshka_lora.operations.export import export as export
    from matryoshka_lora.operations.export import export_folder as export_folder
    from matryoshka_lora.operations.info import FolderInfo as FolderInfo
    from matryoshka_lora.operations.info import LayerInfo as LayerInfo
    from matryoshka_lora.operations.info import LoraInfo as LoraInfo
    from matryoshka_lora.operations.info import info as info
    from matryoshka_lora.operations.info import info_folder as info_folder
    from matryoshka_lora.operations.reorder import reorder as reorder
    from matryoshka_lora.operations.train_ranks import train_ranks as train_ranks
    from matryoshka_lora.peft.adapter import NestedAdapter as NestedAdapter
    from matryoshka_lora.peft.load import load as load
    from matryoshka_lora.peft.nest import nest as nest
    from matryoshka_lora.peft.rank_loss_callback import RankLossCallback as RankLossCallback
    from matryoshka_lora.rules import Rule as Rule

# Names are imported lazily, so that file operations need no torch and `--help` needs no NumPy.
_MODULES = {
    "CombineResult": "operations.combine",
    "Evaluation": "evaluation.results",
    "ExportFolderResult": "operations.export",
    "ExportOptions": "operations.export",
    "ExportResult": "operations.export",
    "ExtractResult": "extraction.extract",
    "Factors": "lora.layer",
    "FolderEvaluation": "evaluation.folder",
    "FolderInfo": "operations.info",
    "Layer": "lora.layer",
    "LayerInfo": "operations.info",
    "Lora": "lora.lora",
    "LoraInfo": "operations.info",
    "MatryoshkaError": "errors",
    "MissingDependencyError": "errors",
    "NestedAdapter": "peft.adapter",
    "Nesting": "nesting",
    "NotFiniteError": "errors",
    "Preview": "evaluation.preview",
    "RankLossCallback": "peft.rank_loss_callback",
    "ReorderResult": "lora.results",
    "Rule": "rules",
    "SaveResult": "lora.save",
    "Selection": "evaluation.select",
    "TrainRanksResult": "lora.results",
    "aurac": "evaluation.results",
    "combine": "operations.combine",
    "evaluate": "evaluation.evaluate",
    "evaluate_folder": "evaluation.folder",
    "export": "operations.export",
    "export_folder": "operations.export",
    "extract": "extraction.extract",
    "info": "operations.info",
    "info_folder": "operations.info",
    "load": "peft.load",
    "nest": "peft.nest",
    "open": "formats.open",
    "preview": "evaluation.preview",
    "reorder": "operations.reorder",
    "select": "evaluation.select",
    "train_ranks": "operations.train_ranks",
}
__all__ = [*_MODULES]
__version__ = "0.5.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from matryoshka_lora.errors import optional_imports

    with optional_imports("image" if name == "preview" else None):
        module = import_module(f"{__name__}.{_MODULES[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
