"""The inference engine: token ids in, token ids out.

It computes answers at any λ from two resident checkpoints. It knows no tokenizer, no HTTP and no
asyncio, and imports nothing of `server`.
"""
