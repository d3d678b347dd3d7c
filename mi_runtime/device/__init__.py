"""Memory of a device and of the host, and copies between the two.

It imports no other package. Others import only `memory` and `transfer`.
"""
