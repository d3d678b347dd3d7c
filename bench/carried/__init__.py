"""What is copied to a GPU machine without network: wheels of packages that it lacks, and compiled
kernels.
"""
