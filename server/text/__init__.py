"""Everything that turns text into token ids and back: checkpoints' tokenizers and chat templates,
think blocks, stop strings, tool calls, and the grammars that answers are held to. It imports `wire`
and knows no HTTP.
"""
