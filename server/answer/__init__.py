"""How token events become an answer: the state of each choice, and the formats in which chunks and
whole answers are written. It imports `text`, `routing`, `engine` and `ops`.
"""
