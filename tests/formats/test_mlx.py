"""The fields of a base model's config that mlx-lm needs. tests/runtimes has mlx-lm itself."""

from __future__ import annotations

from typing import Any

import pytest

from matryoshka_lora.formats.mlx import missing_rope_fields

LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {}),
        ({"rope_theta": 5e5}, {}),
        ({"rope_parameters": DEFAULT}, {"rope_theta": 1e4}),
        ({"rope_parameters": DEFAULT, "rope_theta": 5e5}, {}),
        ({"rope_parameters": LINEAR}, {"rope_theta": 5e5, "rope_scaling": LINEAR}),
        (
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": DEFAULT}},
            {"rope_theta": 5e5, "rope_scaling": LINEAR, "rope_local_base_freq": 1e4},
        ),
    ],
)
def test_rope_fields_are_added_where_they_are_missing(
    config: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert missing_rope_fields(config) == expected
