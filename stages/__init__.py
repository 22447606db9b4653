"""The stages: each is one typed function ``run(config, session) -> Artifact``."""
