"""What stands on the wire: the requests that clients may send, the shapes of answers, the errors
and the OpenAPI document. Everything else in `server` may import it; it imports nothing of `server`.
"""
