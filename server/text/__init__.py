"""Turns text into token ids and back: tokenizers and chat templates of the checkpoints, think
blocks, stop strings, tool calls, and the grammars that constrain answers. It imports `wire`, and
knows no HTTP.
"""
