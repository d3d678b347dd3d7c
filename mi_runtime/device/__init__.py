"""Copies between host and device, and memory of both.

The package imports nothing of the engine.
"""
