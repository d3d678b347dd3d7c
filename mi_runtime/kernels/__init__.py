"""Triton kernels. Imported only where a device or a test asks for them: Triton may not be there."""
