"""Single http requests: an answer comes back only if its status is one the caller can use."""

from __future__ import annotations

import urllib.request
from collections.abc import Set
from urllib.parse import quote, unquote, urlsplit, urlunsplit

import urllib3
from urllib3.exceptions import HTTPError, LocationValueError, MaxRetryError, ResponseError, SSLError

from ..errors import UserError
from .errors import AccessError, MissingFileError, TransientError
from .retries import Deadline
from .settings import RemoteSettings

Answer = urllib3.BaseHTTPResponse
PIECE = 2**20
ACCESS_ADVICE = "Check the address, and the credentials or the token in it."
_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_MISSING_STATUSES = frozenset({404, 410})
# redirects are followed; every other repetition is ours, so that it is counted, logged and bounded by the deadline
_REDIRECTS_ONLY = urllib3.Retry(
    total=None, connect=False, read=False, other=False, redirect=5, status=False, respect_retry_after_header=False
)


class HttpClient:
    """Requests below one address. Its query (``?token=...``) is sent with every request, its user and password as
    basic authentication; proxies are those of the environment (``HTTPS_PROXY``, ``NO_PROXY``).

    Attributes:
        root: the address without credentials and query.
    """

    def __init__(self, address: str, settings: RemoteSettings) -> None:
        parts = urlsplit(address)
        if not parts.hostname:
            raise UserError(f"the address {address!r} names no host. Write it as https://HOST/PATH.")
        self.root = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        self._query = f"?{parts.query}" if parts.query else ""
        self._timeout = settings.timeout_seconds
        self._headers = {"Accept-Encoding": "identity"}
        if parts.username:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers |= urllib3.make_headers(basic_auth=login)
        proxy = urllib.request.getproxies().get(parts.scheme)
        connections = 2 * settings.parallel
        self._pool: urllib3.PoolManager
        if proxy and not urllib.request.proxy_bypass(parts.hostname):
            self._pool = urllib3.ProxyManager(proxy, maxsize=connections, retries=_REDIRECTS_ONLY)
        else:
            self._pool = urllib3.PoolManager(maxsize=connections, retries=_REDIRECTS_ONLY)

    def ask(self, method: str, name: str, wanted: tuple[int, int] | None, until: Deadline, accept: Set[int]) -> Answer:
        """One request for the file ``name``; the body is still to be read.

        Args:
            method: GET or HEAD. name: the file. wanted: start and stop (exclusive) of a byte range, or None.
            until: how long to wait. accept: the statuses to return.

        Raises:
            TransientError: no answer, or one that asks to come back later or is a web page.
            MissingFileError: status 404 or 410. AccessError: any other status.
        """
        address = f"{self.root.rstrip('/')}/{quote(name)}" if name else self.root
        headers = dict(self._headers)
        if wanted:
            headers["Range"] = f"bytes={wanted[0]}-{wanted[1] - 1}"
        patience = min(self._timeout, max(until.left(), 0.001))
        try:
            answer = self._pool.request(
                method,
                address + self._query,
                headers=headers,
                timeout=patience,
                preload_content=False,
                decode_content=False,
            )
        except HTTPError as error:
            raise self._refusal(name, error) from error
        problem = self._problem(answer, name, address, accept)
        if problem:
            answer.close()
            raise problem
        return answer

    def _problem(self, answer: Answer, name: str, address: str, accept: Set[int]) -> Exception | None:
        status = answer.status
        said = f"HTTP status {status} {answer.reason or ''}".rstrip()
        if status in _MISSING_STATUSES:
            return MissingFileError(self.root, name, None, f"there is no such file ({said})", ACCESS_ADVICE)
        if status in _TRANSIENT_STATUSES:
            retry_after = answer.headers.get("Retry-After", "")
            return TransientError(said, float(retry_after) if retry_after.isdecimal() else 0.0)
        if status not in accept:
            return AccessError(self.root, name, None, f"the server refuses it ({said})", ACCESS_ADVICE)
        kind = answer.headers.get("Content-Type", "")
        if status in (200, 206) and kind.startswith("text/html") and not address.endswith((".html", ".htm")):
            return TransientError(f"the server sent a web page in place of the file ({said})")
        return None

    def _refusal(self, name: str, error: HTTPError) -> Exception:
        cause = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        if isinstance(cause, ResponseError | LocationValueError):
            return AccessError(self.root, name, None, f"the address leads nowhere ({cause})", ACCESS_ADVICE)
        if isinstance(cause, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(cause):
            advice = "Name the authority that signed it in SSL_CERT_FILE, or mend the server's certificate."
            return AccessError(self.root, name, None, f"its certificate is not trusted ({cause})", advice)
        return TransientError(f"no answer: {describe(cause)}")


def describe(error: Exception) -> str:
    """What happened, without the exception that urllib3 repeats in its own."""
    first = error.args[0] if error.args else ""
    return first if isinstance(first, str) and first else str(error)


def read_body(answer: Answer, length: int, until: Deadline) -> bytes:
    """The body of ``answer``, which must have exactly ``length`` bytes and arrive before ``until``.

    Raises:
        TransientError: it does not.
    """
    announced = answer.headers.get("Content-Length")
    if announced is not None and int(announced) != length:
        raise TransientError(f"the server announced {announced} bytes where {length} were asked for")
    pieces: list[bytes] = []
    done = 0
    try:
        # one byte more than expected is asked for: that sees a body that goes on, and the end of one that does not
        while done <= length and (piece := answer.read(min(PIECE, length - done + 1))):
            pieces.append(piece)
            done += len(piece)
            if until.passed():
                raise TransientError(f"only {done} of {length} bytes came in time")
    except HTTPError as error:
        raise TransientError(f"the transfer broke off after {done} of {length} bytes ({describe(error)})") from error
    if done != length:
        raise TransientError(f"{done} bytes came where {length} were asked for")
    answer.release_conn()
    return b"".join(pieces)
