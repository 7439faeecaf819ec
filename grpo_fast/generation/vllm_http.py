"""JSON requests to one HTTP server by httpx: a deadline and a size limit for each answer, retries, errors that name the URL."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from grpo_fast.generation.protocol import SamplerError, WeightsLostError
from grpo_fast.utils.redaction import redact_text, remember_secrets

__all__ = ["START_COMMAND", "ConnectionLostError", "NotServedError", "RefusedError", "ServerClient"]

logger = logging.getLogger("grpo_fast")
START_COMMAND = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --dtype DTYPE --logprobs-mode processed_logprobs"
NOTICE_SECONDS = 30.0  # between two messages that the client waits for the server

_BUSY = (429, 500, 502, 503, 504)  # a server that starts, restarts or is overloaded; any other status is its answer
_DEV_MODE = "Fix: start the server with VLLM_SERVER_DEV_MODE=1 in its environment; without it vLLM does not serve this address."
LARGEST_ANSWER = 64 << 20  # bytes; a completion of 100,000 tokens with its log-probabilities has about 5 MB


_API_KEY = "Fix: the key that the server was started with (--api-key), as the sampler option api_key or in VLLM_API_KEY."


class RefusedError(SamplerError):
    """The server has answered that it does not carry out the request, with a status of 400 or more that is not temporary."""


class NotServedError(RefusedError):
    """The server does not serve an address: an older version, or not in development mode."""


class ConnectionLostError(WeightsLostError):
    """The connection broke during a request that must not be repeated: the server may have carried it out, or may have been restarted."""


class ServerClient:
    """Client of one HTTP server, which any number of threads may use.

    Args:
        url: "http://host:port", with or without a path; "https" too. No proxy is used. A password in it is not shown in messages.
        timeout: seconds until an answer must be complete.
        retry_seconds: how long a request is repeated after a refused or broken connection, an incomplete answer, or a status of 429,
            500, 502, 503, 504. The pauses between the attempts begin with 0.1 s and double up to 5 s.
        api_key: sent as a bearer token; None = the environment variable VLLM_API_KEY, if set.

    Raises:
        ValueError: the URL or a number of seconds is invalid.

    Example:
        >>> ServerClient("http://127.0.0.1:8000").get("/v1/models")  # doctest: +SKIP
        {'object': 'list', 'data': [...]}
    """

    def __init__(self, url: str, *, timeout: float = 600.0, retry_seconds: float = 120.0, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url is {redact_text(url)!r}; expected http://host:port, such as http://127.0.0.1:8000.")
        if not timeout > 0 or not retry_seconds >= 0:
            raise ValueError(
                f"timeout is {timeout!r}, retry_seconds is {retry_seconds!r}; expected seconds, timeout > 0 and retry_seconds >= 0."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retry_seconds = timeout, retry_seconds
        key = (api_key if api_key is not None else os.environ.get("VLLM_API_KEY", "")).strip()  # a file's last line ends with a newline
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                "api_key has a character that the header of a request cannot have; expected printable ASCII. Fix: another key."
            )
        remember_secrets({"api_key": key})  # a server may repeat it in the text of an error
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # an answer's size is then what is received
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        self._headers = headers
        self._connections: _Connections | None = None
        self._lock = threading.Lock()
        self._next_notice = 0.0
        self.lost_connections = 0  # how often a connection was refused or broke, except an idle one

    def get(self, path: str) -> Any:
        """Send a GET request and return the decoded JSON of the answer; see `post`."""
        return self._request("GET", path, None, repeatable=True, retry_seconds=self.retry_seconds)

    def post(
        self,
        path: str,
        body: dict[str, Any],
        *,
        repeatable: bool = True,
        retry_seconds: float | None = None,
        timeout: float | None = None,
        largest_answer: int = 0,
    ) -> Any:
        """Send a POST request and return the decoded JSON of the answer; None if it is empty.

        Args:
            path: path below the server's address, such as "/v1/completions".
            body: sent as JSON.
            repeatable: False for a request that must not be carried out twice: it is repeated only if no connection could be made.
            retry_seconds, timeout: in place of the client's.
            largest_answer: bytes that the answer may have, if more than 64 MiB.

        Raises:
            ConnectionLostError: the connection broke, and the request must not be repeated.
            SamplerError: no answer within ``retry_seconds``, or an answer that refuses the request. The message has the URL and the fix.
        """
        retry_seconds = self.retry_seconds if retry_seconds is None else retry_seconds
        payload = json.dumps(body).encode()
        return self._request(
            "POST", path, payload, repeatable=repeatable, retry_seconds=retry_seconds, timeout=timeout, largest_answer=largest_answer
        )

    def close(self) -> None:
        """Close all connections. Requests under way fail; a later request opens new connections."""
        with self._lock:
            connections, self._connections = self._connections, None
        if connections is not None:
            connections.close()

    def _open(self) -> _Connections:
        with self._lock:
            if self._connections is None:
                self._connections = _Connections(self._headers, self.timeout)
            return self._connections

    def _request(
        self,
        method: str,
        path: str,
        payload: bytes | None,
        *,
        repeatable: bool,
        retry_seconds: float,
        timeout: float | None = None,
        largest_answer: int = 0,
    ) -> Any:
        timeout = self.timeout if timeout is None else timeout
        limits = _Limits(timeout, max(largest_answer, LARGEST_ANSWER))
        deadline = time.monotonic() + retry_seconds
        pause, tries = 0.1, 0
        connections = self._open()
        while True:
            tries += 1
            if connections.closed:
                raise SamplerError(f"{method} {self.url}{path}: the client was closed while the request was under way.")
            try:
                client, kept = connections.for_request(repeatable=repeatable), repeatable and tries == 1
                return self._attempt(client, method, path, payload, limits, kept=kept)
            except _RetryableError as failure:
                may_repeat = repeatable or not failure.sent
                if not may_repeat or time.monotonic() + pause > deadline:
                    kind = SamplerError if may_repeat or not failure.broken else ConnectionLostError
                    raise kind(f"{method} {self.url}{path}: {failure.reason}, after {tries} tries. {failure.fix}") from failure.__cause__
                failure_reason = failure.reason
            if tries > 2:
                self._say_waiting(failure_reason, deadline)
            time.sleep(pause)
            pause = min(2 * pause, 5.0)

    def _say_waiting(self, reason: str, deadline: float) -> None:
        """Say that requests wait for the server, once for all that wait at a time."""
        now = time.monotonic()
        with self._lock:
            if now < self._next_notice:
                return
            self._next_notice = now + NOTICE_SECONDS
        what = redact_text(f"{self.url}: {reason}")
        logger.warning("%s. Waiting for the server, for up to %.0f s more (retry_seconds).", what, deadline - now)

    def _attempt(self, client: httpx.Client, method: str, path: str, payload: bytes | None, limits: _Limits, *, kept: bool) -> Any:
        """Send a request once. ``kept``: on a connection that may have been idle, which the server may close at any moment: if it breaks
        before the answer begins, that is no sign of a restart, after which the next attempt fails too.
        """
        answered = False
        late = _RetryableError(
            f"no answer within {limits.seconds:g} s", "Fix: a larger timeout, or fewer tokens; or the server hangs: see its log."
        )
        try:
            with client.stream(method, self.url + path, content=payload, timeout=limits.seconds) as response:
                answered = True
                status, text = response.status_code, _body(response, limits, late)
        except httpx.ConnectError as error:
            self.lost_connections += 1
            reason = "connection refused" if "refused" in str(error).lower() else f"no connection ({error})"
            raise _RetryableError(reason, f"Is the server up? Start it: {START_COMMAND}", sent=False) from error
        except httpx.TimeoutException as error:
            raise late from error
        except httpx.TransportError as error:
            self.lost_connections += answered or not kept
            reason = f"the connection broke ({type(error).__name__}: {error})"
            raise _RetryableError(reason, "Did the server stop? Its log has the reason.", broken=True) from error
        if status in _BUSY:
            fix = "Its log has the reason; restart it if it does not recover."
            raise _RetryableError(f"the server answers {status}: {_excerpt(text)}", fix)
        if status >= 400:
            fix = "The server refused the request: see its message."
            if status in (404, 405) and not path.startswith("/v1"):
                fix = _DEV_MODE
            elif status in (401, 403):
                fix = _API_KEY
            kind = NotServedError if status in (404, 405) else RefusedError
            raise kind(f"{method} {self.url}{path}: the server answers {status}: {_excerpt(text)}. {fix}")
        try:
            return json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            fix = "Is this a vLLM server, and does nothing between here and the server cut answers?"
            raise _RetryableError(f"the answer is no JSON ({_excerpt(text)})", fix) from error


class _Limits(NamedTuple):
    """The limits of an answer."""

    seconds: float
    size: int  # bytes


class _RetryableError(Exception):
    """A reason to repeat a request; it does not leave this module."""

    def __init__(self, reason: str, fix: str, *, sent: bool = True, broken: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix
        self.sent = sent  # the server may have received the request
        self.broken = broken  # the connection broke after that


class _Connections:
    """The connections of a client.

    Before httpx reuses a connection it checks that the server has not closed it. The server may still close it between the check and the
    request, and a request that must not be repeated would be lost; so each such request opens a new connection.
    """

    def __init__(self, headers: dict[str, str], timeout: float) -> None:
        self.closed = False
        self._persistent = _client(headers, timeout, keep_alive=True)
        self._single_use = _client(headers, timeout, keep_alive=False)

    def for_request(self, *, repeatable: bool) -> httpx.Client:
        """The connections for a request that may be repeated, or for one that must not."""
        return self._persistent if repeatable else self._single_use

    def close(self) -> None:
        """Close them."""
        self.closed = True
        self._persistent.close()
        self._single_use.close()


def _body(response: httpx.Response, limits: _Limits, late: _RetryableError) -> bytes:
    """The whole body, received before the deadline and within the size limit: httpx limits the wait for each part, not for all."""
    deadline = time.monotonic() + limits.seconds
    body = bytearray()
    for part in response.iter_raw():
        body += part
        if time.monotonic() > deadline:
            raise late
        if len(body) > limits.size:
            raise SamplerError(
                f"{response.request.method} {response.request.url}: the answer is larger than {limits.size >> 20} MiB; expected "
                "JSON with the tokens of one completion. Is this a vLLM server?"
            )
    return bytes(body)


def _client(headers: dict[str, str], timeout: float, *, keep_alive: bool) -> httpx.Client:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None if keep_alive else 0)
    return httpx.Client(headers=headers, timeout=timeout, limits=limits, trust_env=False, follow_redirects=False)


def _excerpt(text: bytes, limit: int = 300) -> str:
    line = " ".join(text.decode("utf-8", "replace").split())
    return repr(line if len(line) <= limit else f"{line[:limit]}…")
