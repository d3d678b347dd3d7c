"""Sends the answer to a submitted request, as a stream or as one object."""

from typing import Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.answer import sse
from server.answer.answer import Answer
from server.answer.json_answer import json_answer
from server.api.disconnect import ended_on_disconnect
from server.api.event_stream import EventStream
from server.api.prepared_request import PreparedRequest
from server.engine.generation import ClientLeft
from server.routing.requested_lambda import LAMBDA_HEADER
from server.service import Service

CLIENT_CLOSED_REQUEST: Final = 499  # only the log shows it


async def respond(
    request: Request, prepared: PreparedRequest, answer: Answer, service: Service
) -> Response:
    """Returns the response. Raises `ApiError` if an answer that is not streamed fails."""
    headers = {LAMBDA_HEADER: prepared.decision.header}
    if prepared.wire.stream:
        events = sse.events(answer, prepared.answer_format, keep_alive=service.settings.keep_alive)
        return EventStream(events, answer.generation, headers)
    try:
        async with ended_on_disconnect(answer.generation, request.receive):
            return JSONResponse(await json_answer(answer, prepared.answer_format), headers=headers)
    except ClientLeft:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
