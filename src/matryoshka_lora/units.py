"""Parse and format shares, such as ``"95%"``, sizes, such as ``"50MB"``, and counts."""

from __future__ import annotations

import math
import re

from matryoshka_lora.errors import MatryoshkaError, short

_SHARE = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*(%?)\s*")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)(i?)b?\s*")
_EXPONENTS = {"": 0, "k": 1, "m": 2, "g": 3}


def parse_share(share: str | float) -> float:
    """Return a percentage such as ``"95%"``, or a number such as ``0.95``, strictly in (0, 1)."""
    value: float = 0
    if isinstance(share, (int, float)) and not isinstance(share, bool):
        value = share
    elif match := _SHARE.fullmatch(str(share)):
        value = float(match[1]) / (100 if match[2] else 1)
    if not 0 < value < 1:
        raise MatryoshkaError(
            f"{short(share)} is not a share: pass a percentage such as '10%', or a number "
            "between 0 and 1."
        )
    return value


def parse_size(size: str | float, whole: int | None = None) -> int:
    """Return a number of bytes.

    Args:
        size: Bytes, or a string such as ``"50MB"``, ``"1.5 GB"`` or ``"20MiB"``. k, M and G are
            powers of 1000, and Ki, Mi and Gi of 1024.
        whole: The bytes of which ``size`` may be a percentage, such as ``"25%"``.
    """
    if whole is not None and "%" in str(size):
        return int(parse_share(size) * whole)
    value: float = 0
    if isinstance(size, (int, float)) and not isinstance(size, bool):
        value = size
    elif match := _SIZE.fullmatch(str(size).lower()):
        base = 1024 if match[3] else 1000
        value = float(match[1]) * base ** _EXPONENTS[match[2]]
    if not 1 <= value < math.inf:
        raise MatryoshkaError(f"{short(size)} is not a size: pass, for example, '50MB'.")
    return int(value)


def format_size(size: int) -> str:
    """Return a number of bytes for people, such as ``"13.9MB"``."""
    from tqdm import tqdm  # not at the top: its import would slow down `matryoshka --help`

    text: str = tqdm.format_sizeof(size, "B")
    return text


def pluralize(count: int, noun: str) -> str:
    """Return a number with its noun, such as ``"1 layer"`` or ``"2 layers"``."""
    return f"1 {noun}" if count == 1 else f"{count} {noun}s"
