"""The study's tests; models and formulas are those of tests/."""
