"""Choosing a merge on validation sets: searches over recipes, and methods side by side."""
