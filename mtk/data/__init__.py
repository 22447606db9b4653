"""Token sources on disk, training samples and their order."""
