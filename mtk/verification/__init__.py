"""Proof on the machine at hand: layouts, resumes."""
