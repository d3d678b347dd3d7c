"""What is copied to a GPU machine without network.

This is the folder `.wheels`, with wheels of packages that the machine lacks, and compiled kernels.
"""
