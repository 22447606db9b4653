"""Weights in fewer bits: one internal form, two dialects on disk, a quality gate."""
