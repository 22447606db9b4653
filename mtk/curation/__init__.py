"""Raw dumps and crawls to clean corpora."""
