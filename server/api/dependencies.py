"""The argument of handlers that FastAPI fills in: the service."""

from typing import Annotated

from fastapi import Depends, Request

from server.service import Service


async def _service_of(request: Request) -> Service:  # a plain function would run in a thread
    service: Service = request.app.state.service
    return service


ServiceOfApp = Annotated[Service, Depends(_service_of)]
