"""Train and fine-tune SigLIP-style dual encoders, and tell whether their space is any good."""

__version__ = "0.1.0"
