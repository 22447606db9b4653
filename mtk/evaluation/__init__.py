"""Scores of a model on given files: perplexity and LAMBADA."""
