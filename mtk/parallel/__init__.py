"""The parallel core: one technique a file, applied in one fixed order."""
