"""Engine, REST server and client."""
