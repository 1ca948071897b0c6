"""A small real server of the OpenAI chat protocol on this machine, that answers as told and keeps what it got."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | int | bytes | None
"""A text of the model, a status to fail with, raw bytes to send, or None to cut the connection."""


class Server:
    """What a test sets and looks at: `answer` gets a request's messages, `requests` and `keys` are those that came."""

    def __init__(self, answer: Callable[[list[dict[str, str]]], Answer]) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""


@contextmanager
def chat_server(answer: Callable[[list[dict[str, str]]], Answer]) -> Iterator[Server]:
    """A server on a free port of this machine, for the time of the block."""
    state = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"data": [{"id": "listed"}]} if self.path == "/v1/models" else 404)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append(body)
            state.keys.append(self.headers.get("Authorization"))
            answered = state.answer(body["messages"]) if self.path == "/v1/chat/completions" else 404
            self.reply({"choices": [{"message": {"content": answered}}]} if isinstance(answered, str) else answered)

        def reply(self, value: dict[str, Any] | int | bytes | None) -> None:
            if value is None:
                self.close_connection = True
                return
            data = json.dumps(value).encode() if isinstance(value, dict) else value if isinstance(value, bytes) else b""
            self.send_response(value if isinstance(value, int) else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
