"""Turns the engine's token events into an answer: `choice` makes chunks of text, `answer` collects
those of one request, `sse` and `complete` write them in one of two formats. It imports `text`,
`routing`, `engine` and `ops`.
"""
