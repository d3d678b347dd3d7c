"""What clients and the server exchange: models of requests and of answers, errors, and the OpenAPI
document. It imports no other package. Others import everything but `response_models`,
`response_format`, `validation` and `wire_model`.
"""
