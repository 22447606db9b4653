"""Layouts: how models and batches are spread over ranks."""
