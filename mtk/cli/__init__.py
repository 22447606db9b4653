"""The command line: thin commands whose options come from the configuration dataclasses."""
