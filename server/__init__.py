"""The HTTP side: OpenAI's API in front of one engine process. Imports no torch."""

__version__ = "0.1.0"
