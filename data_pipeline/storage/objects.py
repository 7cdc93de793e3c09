"""Object stores (s3, gs, any scheme that fsspec knows) as a store."""

from __future__ import annotations

import sys
from typing import Any

import fsspec

from ..errors import UserError
from ..settings import nearest
from .errors import AccessError, MissingFileError, StorageError, TransientError
from .http_client import ACCESS_ADVICE
from .remote import COPY_ADVICE, RemoteStore, Version
from .retries import Deadline
from .settings import StorageSettings
from .store import scheme

# what s3fs and gcsfs let through of the libraries below them, none of it an OSError; the first of two bases wins
_TRANSIENT = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "HTTPClientError"),
    ("botocore.exceptions", "ConnectionError"),
    ("gcsfs.retry", "HttpError"),
)
_PERMANENT = (("botocore.exceptions", "BotoCoreError"), ("google.auth.exceptions", "GoogleAuthError"))
_SCHEMES = ("file", "gs", "http", "https", "pipe", "s3")


class ObjectStore(RemoteStore):
    """Files below an address that fsspec serves.

    Credentials and endpoints come from where the scheme's package looks for them (for s3 ``AWS_*`` variables and
    ``~/.aws``, for gs Google's default credentials), or from fsspec's own configuration (``FSSPEC_S3_...``). gcsfs
    repeats requests on its own below our attempts; those are not counted.
    """

    def __init__(self, root: str, settings: StorageSettings) -> None:
        kind = scheme(root)
        try:
            fsspec.get_filesystem_class(kind)
        except ValueError as error:
            raise UserError(
                f"nobody knows the scheme {kind!r} of {root!r}{nearest(kind, _SCHEMES)} Mend the address."
            ) from error
        except ImportError as error:
            raise UserError(
                f"{root!r} needs a package that is not installed ({error}). Run `pip install 'headrace[remote]'`, "
                "which brings those for s3 and gs."
            ) from error
        super().__init__(root, root.partition("?")[0], settings)

    def _start(self) -> None:
        super()._start()
        self._system: Any = None
        self._path = ""

    def _open(self) -> Any:
        """The file system, made on first use in each process: its event loop does not survive a fork."""
        if self._system is None:
            # no caches: fsspec would keep connections of the parent process, and sizes from before a change
            options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
            if scheme(self._address) in ("s3", "s3a"):
                remote = self.settings.remote
                options["config_kwargs"] = {
                    "connect_timeout": remote.timeout_seconds,
                    "read_timeout": remote.timeout_seconds,
                    "max_pool_connections": 2 * remote.parallel,
                    # ours are counted, logged and bounded by the deadline
                    "retries": {"max_attempts": 0},
                }
            self._system, self._path = fsspec.core.url_to_fs(self._address, **options)
            if hasattr(self._system, "retries"):
                self._system.retries = 1  # attempts of s3fs, above those of botocore
        return self._system

    def _version(self, name: str, until: Deadline) -> Version:
        info = self._call(name, None, "info", {})
        if info.get("type") == "directory" or info.get("size") is None:
            raise MissingFileError(self.root, name, None, "there is no such file, but a folder", ACCESS_ADVICE)
        return Version(int(info["size"]), info.get("ETag") or info.get("etag"))

    def _get(self, name: str, start: int, stop: int, until: Deadline) -> tuple[bytes, Version | None]:
        try:
            content: bytes = self._call(name, start, "cat_file", {"start": start, "end": stop})
        except TransientError:
            self._check_stop(name, start, stop, until)
            raise
        if len(content) != stop - start:
            self._check_stop(name, start, stop, until)
            raise TransientError(f"{len(content)} bytes came where {stop - start} were asked for")
        return content, None

    def _begin(self, name: str, until: Deadline) -> tuple[bytes, Version]:
        version = self._version(name, until)
        length = min(version.size, self.settings.remote.range_bytes)
        return self._get(name, 0, length, until)[0] if length else b"", version

    def _check_stop(self, name: str, start: int, stop: int, until: Deadline) -> None:
        size = self._version(name, until).size
        if size < stop:
            reason = f"the file ends before byte {stop} (it has {size} bytes)"
            raise StorageError(self.root, name, min(start, size), reason, COPY_ADVICE)

    def _call(self, name: str, start: int | None, method: str, arguments: dict[str, int]) -> Any:
        """One call of the file system, its many kinds of failure told apart."""
        try:
            system = self._open()
            path = f"{self._path.rstrip('/')}/{name}" if name else self._path
            return getattr(system, method)(path, **arguments)
        except FileNotFoundError as error:
            raise MissingFileError(self.root, name, None, f"there is no such file ({error})", ACCESS_ADVICE) from error
        except PermissionError as error:
            raise AccessError(self.root, name, start, f"access is refused ({error})", ACCESS_ADVICE) from error
        except (OSError, EOFError) as error:  # time-outs are among the OSErrors
            raise TransientError(f"{type(error).__name__}: {error}") from error
        except _foreign(_TRANSIENT) as error:
            raise TransientError(f"{type(error).__name__}: {error}") from error
        except _foreign(_PERMANENT) as error:
            reason = f"access failed ({type(error).__name__}: {error})"
            raise AccessError(self.root, name, start, reason, ACCESS_ADVICE) from error


def _foreign(names: tuple[tuple[str, str], ...]) -> tuple[type[Exception], ...]:
    """Those of the named classes whose module is loaded: an error can only come from a module that is."""
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
