"""The models that benchmarks measure: shapes, random pairs in memory and on disk, the engine on a
merged checkpoint, and the requests of a round.
"""
