"""What clients and server exchange: requests, the shapes of answers, errors, and the OpenAPI
document. Everything else in `server` may import it; it imports nothing else of `server`.
"""
