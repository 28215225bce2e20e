"""The comparison of methods: a grid of recipes, tasks, learning rates and seeds, and what it says."""
