"""A server of `chorus serve` in a process of its own, and its clients."""

import http.client
import json
import subprocess
from typing import Any

import openai

KEY = "a key of the tests"


class Served:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.client = openai.OpenAI(api_key=KEY, base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)

    def health(self) -> dict[str, Any]:
        return self.send("GET", "/health")[1]

    def send(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, Any]:
        """A request of any form; a text is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = body if isinstance(body, str | None) else json.dumps(body)
        about = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
        connection.request(method, path, data, about)
        response = connection.getresponse()
        found = json.loads(response.read())
        connection.close()
        return response.status, found

    def open_stream(self, max_tokens: int) -> http.client.HTTPResponse:
        """A stream of which one event has been read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        # Greedily this text goes round in circles and never ends.
        body = {"model": "agent_0", "prompt": "Question:", "temperature": 0}
        about = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        data = json.dumps({**body, "max_tokens": max_tokens, "stream": True})
        connection.request("POST", "/v1/completions", data, about)
        response = connection.getresponse()
        assert response.status == 200
        assert response.readline().startswith(b"data: ")
        response.own_connection = connection  # pyright: ignore[reportAttributeAccessIssue]
        return response
