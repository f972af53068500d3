"""A chat-completion server on this machine that says what it is told to, and questions to answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

QUESTIONS = [
    {
        "question_id": 1,
        "category": "writing",
        "turns": ["Write one line about a harbour.", "Now say it without the letter e."],
    },
    {
        "question_id": 2,
        "category": "math",
        "turns": ["How much is 6 times 7?", "And half of that?"],
    },
    {
        "question_id": 3,
        "category": "extraction",
        "turns": ["Which colours are in: red barn, green door?", "Sort them by the alphabet."],
    },
]
REFERENCES = [
    {
        "question_id": 2,
        "answer_id": "r2",
        "model_id": "a person",
        "choices": [{"index": 0, "turns": ["It is 42.", "It is 21."]}],
        "tstamp": 0.0,
    }
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Say:
    """One response: what it says (a completion, or a whole body), after how long."""

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    after: float = 0.0
    drip: bool = False
    finish: str = "stop"


Script = Callable[[dict[str, Any], int], Say]
"""From a request and how many came before it to what is said."""


class Stub:
    """What a running server has seen."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()


@contextmanager
def serve(script: Script) -> Iterator[Stub]:
    """Run the server for the time of a block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                number = len(stub.requests)
                stub.requests.append(asked)
                stub.paths.append(self.path)
                stub.keys.append(self.headers.get("Authorization"))
                stub.at_once += 1
                stub.most_at_once = max(stub.most_at_once, stub.at_once)
            say = script(asked, number)
            time.sleep(say.after)
            with stub.lock:
                stub.at_once -= 1
            message = {"role": "assistant", "content": say.text}
            completion = {"choices": [{"message": message, "finish_reason": say.finish}]}
            body = json.dumps(completion).encode() if say.body is None else say.body
            try:
                self.send_response(say.status)
                for name, value in {"Content-Length": str(len(body)), **say.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in [body] if not say.drip else [body[i : i + 1] for i in range(len(body))]:
                    self.wfile.write(byte)
                    if say.drip:
                        time.sleep(0.05)
            except OSError:
                pass  # the client did not wait

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub = Stub(f"http://127.0.0.1:{server.server_address[1]}/v1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
