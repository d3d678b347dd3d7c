"""The HTTP process: it serves OpenAI's API in front of one engine process, and imports no torch."""

__version__ = "0.1.0"
