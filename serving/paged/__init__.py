"""Continuous batching on a paged cache: blocks, schedule, forward pass and sampling."""
