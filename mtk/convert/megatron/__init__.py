"""Megatron-LM's checkpoint format ``torch``: read, cut for other layouts, written."""
