"""The inference engine: token ids in, token ids out.

It computes answers at any λ from two resident checkpoints. But for
`embedded_pair`, it knows no tokenizer. It knows no HTTP and no asyncio, and imports nothing of
`server`.
"""
