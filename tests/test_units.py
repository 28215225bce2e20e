"""Shares and sizes as people write them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from matryoshka_lora.errors import MatryoshkaError
from matryoshka_lora.units import format_size, parse_share, parse_size, pluralize


@pytest.mark.parametrize(
    ("share", "expected"),
    [("95%", 0.95), (0.95, 0.95), (" 99.5 % ", 0.995), (".5", 0.5), ("0.5%", 0.005), (1e-5, 1e-5)],
)
def test_a_share_is_a_percentage_or_a_fraction(share: Any, expected: float) -> None:
    assert parse_share(share) == pytest.approx(expected)


@pytest.mark.parametrize(
    "share",
    [
        "",
        "most",
        "101%",
        "100%",
        "0%",
        0,
        1,
        -1,
        "sv_ratio=20",
        "nan",
        "1.5",
        95,
        "1e-2",
        None,
        True,
    ],
)
def test_a_share_outside_of_0_and_1_is_rejected(share: Any) -> None:
    with pytest.raises(MatryoshkaError, match="share"):
        parse_share(share)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("50MB", 50 * 10**6),
        ("1.5 kB", 1500),
        ("2KiB", 2048),
        ("1gib", 2**30),
        (7, 7),
        (5e16, 5 * 10**16),
        ("1gb", 10**9),
        ("100k", 100_000),
        ("0.3M", 300_000),
        ("5 b", 5),
    ],
)
def test_a_size_is_a_number_of_bytes_with_a_unit(size: Any, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    "size", ["", "0", "5 parsecs", -1, "MB", "inf", None, True, 0.5, math.inf, math.nan]
)
def test_what_is_not_a_positive_size_is_rejected(size: Any) -> None:
    with pytest.raises(MatryoshkaError, match="size"):
        parse_size(size)


@pytest.mark.parametrize("size", ["999", "13.9MB", "2.00GB"])
def test_a_formatted_size_can_be_parsed(size: str) -> None:
    number = parse_size(size)
    assert parse_size(format_size(number)) == number


@pytest.mark.parametrize(("count", "expected"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers")])
def test_nouns_agree_with_their_number(count: int, expected: str) -> None:
    assert pluralize(count, "layer") == expected
