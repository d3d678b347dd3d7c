"""The host's dealings with the device: copies between the two, and memory. It imports nothing of
the engine.
"""
