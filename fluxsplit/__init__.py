"""fluxsplit: FLUX.1 on small graphics cards, by sampling and decoding in processes of their own."""

__version__ = "0.1.0"
