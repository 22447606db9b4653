"""Number formats of training: fp32 main weights and loss scaling."""
