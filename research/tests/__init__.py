"""The tests of the studies."""
