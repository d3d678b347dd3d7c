"""The engine: token ids in, token ids out. No tokenizer, no HTTP, no asyncio."""
