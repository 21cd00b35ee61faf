"""Checkpoints that are quantised already: one file for each family of formats."""
