"""How fast models are served: a server under load, decoding by itself."""
