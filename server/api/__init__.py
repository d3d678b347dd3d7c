"""The HTTP endpoints and the process that serves them: a request is read, prepared and answered
here. It imports everything but the commands; only `serve` imports it.
"""
