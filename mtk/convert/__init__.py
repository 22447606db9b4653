"""Conversion between native models and Hugging Face directories, with a certificate."""
