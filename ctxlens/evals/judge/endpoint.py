"""One chat completion from an OpenAI-compatible server, with a bounded number of tries."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ctxlens.errors import InputError

if TYPE_CHECKING:
    import httpx

_AGAIN = (408, 409, 425, 429)
_FATAL = (401, 403, 404)
_LARGEST_REPLY = 2**20
_SHOWN = 300


@dataclass(frozen=True)
class Reply:
    """A judge's reply.

    Attributes:
        text: the judge's text; if the reply is not a chat completion, the body of the response.
        error: why there is no complete answer; empty if there is one.
        fatal: whether every other request would fail, too (a wrong key, address or model).
    """

    text: str
    error: str = ""
    fatal: bool = False


@dataclass(frozen=True)
class Endpoint:
    """The server and model that serve as judge.

    Attributes:
        url: the base address, to which `/chat/completions` is appended, such as `http://localhost:8000/v1`.
        model: the judge's name on that server.
        key_env: the environment variable that holds the key. The key itself is stored nowhere, and is removed
            from everything that the server sends back.
        timeout_s: time limit of one request, in seconds.
        tries: upper bound on the requests for one question, if the server is busy, fails or does not answer.
        first_wait_s: the pause before the second try, in seconds. It doubles with each try, unless the server
            asks for a longer pause.
        longest_wait_s: upper bound on every pause, in seconds, whatever the server asks for.
        max_tokens: upper bound on the tokens of a reply, its thinking included. A reply that reaches it is
            cut off, and its rating does not count.

    Raises:
        InputError: the address or a number is not valid, or the environment variable is not set.
    """

    url: str
    model: str
    key_env: str | None = None
    timeout_s: float = 120.0
    tries: int = 5
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            broken = parts.scheme not in ("http", "https") or not parts.hostname
        except ValueError:
            raise InputError("the judge's address is not valid; expected http://host/v1.") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            raise InputError(
                "the judge's address must hold no key, user or query, because it is stored; give the key in "
                "an environment variable."
            )
        if broken:
            raise InputError(f"the judge's address {self.url!r} must begin with http:// or https://.")
        if not self.model.strip():
            raise InputError("the judge has no model name; give the name of the model on its server.")
        if self.timeout_s <= 0 or self.tries < 1 or self.max_tokens < 1:
            raise InputError(
                "the judge's timeout must be above 0 seconds, and its tries and tokens at least 1."
            )
        self._key()

    def _key(self) -> str | None:
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        if not key:
            raise InputError(
                f"the environment variable {self.key_env}, which holds the judge's key, is not set."
            )
        if not key.isascii() or not key.isprintable():
            raise InputError(
                f"the environment variable {self.key_env} holds no valid key; expected printable ASCII text."
            )
        return key

    @contextmanager
    def open(self) -> Iterator[Session]:
        """A session that several threads can use, open for the duration of a `with` block."""
        import httpx

        key = self._key()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        with httpx.Client(headers=headers, timeout=self.timeout_s) as client:
            session = Session(self, client, key)
            try:
                yield session
            finally:
                session.stop()


class Session:
    """An open connection to a judge.

    Args:
        endpoint: the judge.
        client: sends the requests; it holds the headers.
        key: the key, which is removed from replies; None if there is none.
    """

    def __init__(self, endpoint: Endpoint, client: httpx.Client, key: str | None) -> None:
        self._endpoint, self._client, self._key = endpoint, client, key
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End all pauses and further tries."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called, so that nothing more may be asked."""
        return self._stopped.is_set()

    def ask(self, system: str, user: str) -> Reply:
        """The judge's reply, or the reason why there is none; failures of the network are not raised."""
        body = json.dumps(
            {
                "model": self._endpoint.model,
                "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
                "temperature": 0,
                "max_tokens": self._endpoint.max_tokens,
            }
        ).encode()
        reply = Reply("", "not asked")
        for attempt in range(self._endpoint.tries):
            reply, wait = self._try(body)
            if wait is None or attempt + 1 == self._endpoint.tries:
                break
            patience = self._endpoint.first_wait_s * 2**attempt * random.uniform(0.75, 1.25)
            if self._stopped.wait(min(max(wait, patience), self._endpoint.longest_wait_s)):
                break
        return reply

    def _try(self, body: bytes) -> tuple[Reply, float | None]:
        """The reply to one request, and the pause before the next try; None if another try is useless."""
        import httpx

        url = self._endpoint.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        try:
            with self._client.stream("POST", url, content=body) as response:
                content = self._receive(response)
                status, headers = response.status_code, response.headers
        except (httpx.TimeoutException, TimeoutError):
            return Reply("", f"no answer within {self._endpoint.timeout_s:g} s"), 0.0
        except httpx.UnsupportedProtocol as error:
            return Reply("", self._clean(str(error)), fatal=True), None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return Reply("", self._clean(f"{type(error).__name__}: {error}")[:_SHOWN]), 0.0
        text = self._clean(content.decode("utf-8", "replace"))
        if status != 200:
            error = f"HTTP {status}: {' '.join(text[:_SHOWN].split())}".rstrip(": ")
            again = status in _AGAIN or status >= 500
            return Reply(text, error, status in _FATAL), _retry_after(headers) if again else None
        reply = _read_completion(text, self._endpoint.max_tokens)
        return replace(reply, text=self._clean(reply.text)), None

    def _receive(self, response: httpx.Response) -> bytes:
        """The body of a response, at most `_LARGEST_REPLY` bytes.

        Raises:
            TimeoutError: it takes longer than the time limit of a request.
        """
        until = time.monotonic() + self._endpoint.timeout_s
        content = b""
        for piece in response.iter_bytes():
            content += piece
            if time.monotonic() > until:
                raise TimeoutError
            if len(content) > _LARGEST_REPLY:
                return content[:_LARGEST_REPLY]
        return content

    def _clean(self, text: str) -> str:
        """The text with the key replaced by `[key]`."""
        return text.replace(self._key, "[key]") if self._key else text


def _read_completion(text: str, max_tokens: int) -> Reply:
    """The reply in the body of a response; what was cut off at `max_tokens` has an error."""
    try:
        choice = json.loads(text)["choices"][0]
        said = _join_texts(choice["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return Reply(text, "the reply is not a chat completion")
    if choice.get("finish_reason") == "length":
        return Reply(said or text, f"the reply was cut off at {max_tokens} tokens (--judge-max-tokens)")
    return Reply(text, "the reply holds no text") if said is None else Reply(said)


def _join_texts(content: Any) -> str | None:
    """The text of a message; of one in parts, the parts that are text. None if there is none."""
    if isinstance(content, list):
        texts = [part["text"] for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(texts) if texts else None
    return content.encode("utf-8", "replace").decode() if isinstance(content, str) else None


def _retry_after(headers: Mapping[str, str]) -> float:
    """The pause in seconds that a server asks for; 0 if it asks for none."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
        return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


__all__ = ["Endpoint", "Reply", "Session"]
