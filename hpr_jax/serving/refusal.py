"""Answers to requests that are not carried out: a status, and one sentence as JSON."""

import json
from collections.abc import Mapping

from starlette.responses import Response


class Refusal(Exception):
    """A request that is not carried out.

    Attributes:
      status: of the answer, as HTTP numbers them.
      headers: more headers of the answer.
    """

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None):
        super().__init__(sentence)
        self.status, self.headers = status, dict(headers or {})

    def response(self) -> Response:
        return json_response({"error": str(self)}, self.status, self.headers)


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with values of JSON."""
    data = json.dumps(content, allow_nan=False).encode() + b"\n"
    return Response(data, status, dict(headers or {}), media_type="application/json")
