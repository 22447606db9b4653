"""Dumps of Wikipedia to clean articles."""
