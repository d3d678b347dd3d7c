"""A real server process for benchmarks over HTTP, and the streams that its clients read."""
