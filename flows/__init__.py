"""Flows: chains of stages, with Prefect (``flows.end_to_end``) or without (``flows.runner``)."""
