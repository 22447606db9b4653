"""Processes of a job: how ranks start, find each other, and how a failure is told."""
