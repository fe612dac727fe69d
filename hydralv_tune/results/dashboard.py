"""The Optuna dashboard on this machine alone, and for reading alone unless told otherwise.

It has no login, and a `DELETE` on a study deletes it, so it is served behind a small guard.
"""

from __future__ import annotations

import socketserver
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna_dashboard

from hydralv_tune.config.errors import InputError
from hydralv_tune.results.publish import ArtifactFolder
from hydralv_tune.study.study import open_all

HOST = "127.0.0.1"
READS = ("GET", "HEAD")
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
REFUSED = (
    b'{"reason": "This dashboard is for reading. Start it with --writable to change studies."}'
)
FOREIGN = b'{"reason": "This dashboard answers to 127.0.0.1 and localhost alone."}'

StartResponse = Callable[..., Any]
Application = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class Guard:
    """Lets only local readers through to a WSGI application.

    A page of another site that is open in the same browser could otherwise reach the dashboard:
    by a name of its own that points here, or by a request that needs no answer.

    Args:
        application: What is guarded.
        writable: Let other methods than GET and HEAD through, from pages of the dashboard.
    """

    def __init__(self, application: Application, *, writable: bool = False) -> None:
        self.application, self.writable = application, writable

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request, or refuse it."""
        method = environ.get("REQUEST_METHOD", "")
        if not _is_local(environ.get("HTTP_HOST", "")):
            return _refuse(start_response, "403 Forbidden", FOREIGN)
        if method not in READS:
            if not self.writable:
                return _refuse(start_response, "405 Method Not Allowed", REFUSED)
            origin = environ.get("HTTP_ORIGIN", "")
            if origin and not _is_local(origin.partition("://")[2]):
                return _refuse(start_response, "403 Forbidden", FOREIGN)

        def start(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            # Artifacts are offered to every site by the application; here they are not.
            kept = [pair for pair in headers if not pair[0].lower().startswith("access-control-")]
            return start_response(status, kept, *rest)

        return self.application(environ, start)


def _is_local(host: str) -> bool:
    """Return whether a host, with or without a port, is this machine by its own name."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name in LOCAL_NAMES


def _refuse(start_response: StartResponse, status: str, body: bytes) -> list[bytes]:
    """Answer with a reason, in the form in which the dashboard shows it."""
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    if status.startswith("405"):
        headers.append(("Allow", ", ".join(READS)))
    start_response(status, headers)
    return [body]


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """One thread a request: the page asks for many things at once."""

    daemon_threads = True


class _Handler(WSGIRequestHandler):
    """Writes no line per request."""

    def log_message(self, format: str, *args: Any) -> None:
        """Keep silent."""

    def address_string(self) -> str:
        """Return the address as it is, without asking a name server."""
        return str(self.client_address[0])


def application(storage: str, *, writable: bool = False) -> Guard:
    """Return the guarded dashboard of a storage as a WSGI application.

    Args:
        storage: Of the studies.
        writable: Let requests that change something through.

    Raises:
        StudyError: The storage does not exist or answer, or holds no study.
    """
    studies = open_all(storage)
    folders = dict.fromkeys(study.out / "artifacts" for study in studies if study.out is not None)
    store = ArtifactFolder(*folders) if folders else None
    return Guard(optuna_dashboard.wsgi(studies[0].rdb, artifact_store=store), writable=writable)


def make_dashboard(storage: str, *, port: int, writable: bool = False) -> WSGIServer:
    """Return a server of the dashboard that is bound and not yet serving.

    Args:
        storage: Of the studies.
        port: On 127.0.0.1; 0 is any free one.
        writable: Let requests that change something through.

    Raises:
        StudyError: The storage does not exist or answer, or holds no study.
        InputError: The port is taken.
    """
    guarded = application(storage, writable=writable)
    try:
        return make_server(HOST, port, guarded, server_class=_Server, handler_class=_Handler)
    except OSError as error:
        raise InputError(
            f"--port: {HOST}:{port} cannot be bound: {error.strerror}. Try --port {port + 1}."
        ) from error


def serve(
    storage: str,
    *,
    port: int = 8080,
    writable: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the dashboard until it is interrupted.

    Args:
        storage: Of the studies.
        port: On 127.0.0.1; 0 is any free one.
        writable: Let requests that change something through.
        ready: Told the address once it answers.

    Raises:
        StudyError: The storage does not exist or answer, or holds no study.
        InputError: The port is taken.
    """
    server = make_dashboard(storage, port=port, writable=writable)
    with server:
        if ready is not None:
            ready(f"http://{HOST}:{server.server_port}/")
        server.serve_forever()
