"""Comparing models on the same clips, prompts and noise."""
