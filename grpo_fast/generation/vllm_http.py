"""A small HTTP client for one server: JSON in, JSON out, kept-alive connections, retries with a time limit, errors that name the URL."""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from grpo_fast.generation.protocol import SamplerError

__all__ = ["Server"]

_BUSY = (429, 500, 502, 503, 504)  # a server that starts, restarts or is overloaded; everything else is an answer
_DEV_MODE = "Cure: start the server with VLLM_SERVER_DEV_MODE=1 in its environment; without it vLLM does not serve this address."


class Server:
    """One HTTP server, spoken to from any number of threads.

    Args:
        url: "http://host:port", with or without a path; "https" too. No proxy is used.
        timeout: seconds one answer may take.
        retry_seconds: how long a request is tried again after a refused or broken connection, a torn answer, or one of 429, 500, 502, 503
            and 504. Between the tries: 0.1 s, doubling up to 5 s.
        api_key: sent as a bearer token; None = the environment variable VLLM_API_KEY, if set.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, retry_seconds: float = 120.0, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {url!r}; expected http://host:port, such as http://127.0.0.1:8000.")
        if not timeout > 0 or not retry_seconds >= 0:
            raise ValueError(
                f"timeout is {timeout!r}, retry_seconds is {retry_seconds!r}; expected seconds, timeout > 0 and retry_seconds >= 0."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._parts = urlsplit(self.url)
        self.timeout, self.retry_seconds = timeout, retry_seconds
        key = api_key if api_key is not None else os.environ.get("VLLM_API_KEY")
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._local = threading.local()
        self._open: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def get(self, path: str) -> Any:
        return self._ask("GET", path, None, retry_busy=True)

    def post(self, path: str, body: dict[str, Any], *, retry_busy: bool = True) -> Any:
        """The decoded answer; None if it is empty.

        Args:
            path: below the server's address, such as "/v1/completions".
            body: sent as JSON.
            retry_busy: False for what must not be done twice: then only a refused connection is tried again.

        Raises:
            SamplerError: no answer within ``retry_seconds``, or one that says no. The message has the URL and the cure.
        """
        return self._ask("POST", path, json.dumps(body).encode(), retry_busy=retry_busy)

    def close(self) -> None:
        with self._lock:
            for connection in self._open:
                connection.close()
            self._open.clear()
        self._local = threading.local()

    def _ask(self, method: str, path: str, payload: bytes | None, *, retry_busy: bool) -> Any:
        give_up = time.monotonic() + self.retry_seconds
        pause, tries = 0.1, 0
        while True:
            tries += 1
            try:
                return self._once(method, path, payload)
            except _Again as again:
                transient = retry_busy or again.refused
                if not transient or time.monotonic() + pause > give_up:
                    raise SamplerError(f"{method} {self.url}{path}: {again.reason}, after {tries} tries. {again.cure}") from again.__cause__
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _once(self, method: str, path: str, payload: bytes | None) -> Any:
        connection = self._connection()
        try:
            connection.request(method, self._parts.path + path, payload, self._headers)
            response = connection.getresponse()
            text = response.read()
        except ConnectionRefusedError as error:
            self._drop(connection)
            raise _Again("connection refused", "Is the server up? Start it: vllm serve MODEL --port PORT.", refused=True) from error
        except TimeoutError as error:
            self._drop(connection)
            cure = "Cure: a larger timeout, fewer tokens, or a look at the server's log: it may hang."
            raise _Again(f"no answer within {self.timeout:g} s", cure) from error
        except (http.client.HTTPException, OSError) as error:
            self._drop(connection)
            raise _Again(
                f"the connection broke ({type(error).__name__}: {error})", "Did the server die? Its log has the reason."
            ) from error
        if response.status in _BUSY:
            raise _Again(
                f"the server answers {response.status}: {_words(text)}", "Its log has the reason; restart it if it does not recover."
            )
        if response.status >= 400:
            cure = _DEV_MODE if response.status in (404, 405) and not path.startswith("/v1") else "The request was refused: see its words."
            raise SamplerError(f"{method} {self.url}{path}: the server answers {response.status}: {_words(text)}. {cure}")
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            self._drop(connection)
            raise _Again(
                f"the answer is no JSON ({_words(text)})", "Is this a vLLM server, and nothing between that cuts answers?"
            ) from error

    def _connection(self) -> http.client.HTTPConnection:
        connection: http.client.HTTPConnection | None = getattr(self._local, "connection", None)
        if connection is None:
            kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(self._parts.hostname or "", self._parts.port, timeout=self.timeout)
            self._local.connection = connection
            with self._lock:
                self._open.append(connection)
        return connection

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        connection.close()
        self._local.connection = None
        with self._lock:
            if connection in self._open:
                self._open.remove(connection)


class _Again(Exception):  # noqa: N818  (a reason to try again, not an error that leaves this file)
    def __init__(self, reason: str, cure: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.cure, self.refused = reason, cure, refused


def _words(text: bytes, limit: int = 300) -> str:
    words = " ".join(text.decode("utf-8", "replace").split())
    return repr(words if len(words) <= limit else f"{words[:limit]}…")
