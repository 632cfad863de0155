"""tq: large language models that fit, run fast and stay sharp on one machine."""

__version__ = "0.1.0"
