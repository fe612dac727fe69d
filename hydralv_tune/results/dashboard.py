"""The Optuna dashboard on this machine alone, and for reading alone unless told otherwise.

It has no login, and a `DELETE` on a study deletes it, so it is served behind a small guard.
"""

from __future__ import annotations

import json
import socketserver
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import bottle
import optuna_dashboard
from optuna_dashboard._serializer import (
    serialize_distribution,
    serialize_frozen_trial,
    serialize_study_detail,
)

from hydralv_tune.config.errors import InputError
from hydralv_tune.results.publish import ArtifactFolder
from hydralv_tune.study.dashboard_view import (
    OF_A_TRIAL,
    StudiesView,
    shared_and_all_distributions,
)
from hydralv_tune.study.find import find_study
from hydralv_tune.study.optuna_private import id_of_study, trial_id
from hydralv_tune.study.study import Study, open_all, open_readonly
from hydralv_tune.study.study_folder import DATABASE

HOST = "127.0.0.1"
SCRIPT = Path(__file__).with_name("dashboard.js")
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; frame-src 'self'; object-src 'none'; "
    "connect-src 'self'; style-src 'self' data: 'unsafe-inline'; script-src 'self' 'unsafe-eval'"
)
"""What the page may load, as the Optuna dashboard has it: parallel coordinates evaluate code."""

READS = ("GET", "HEAD")
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
REFUSED = (
    b'{"reason": "This dashboard is for reading. Start it with --writable to change studies."}'
)
FOREIGN = b'{"reason": "This dashboard answers to 127.0.0.1 and localhost alone."}'

StartResponse = Callable[..., Any]
Application = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]


class AccessGuard:
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


def studies_at(place: str | Path | None) -> list[Study]:
    """Open the studies of a storage URL, or those beside the study of a folder.

    Args:
        place: Storage URL or folder; None is the newest study under `runs/`.

    Raises:
        StudyError: There is no study.
    """
    if place is not None and "://" in str(place):
        return open_all(str(place))
    if place is not None and (database := Path(place) / DATABASE).is_file():
        return open_all(f"sqlite:///{database}")
    found = find_study(place)
    return [open_readonly(found.storage, found.name, found.folder)]


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


def application(studies: Sequence[Study], *, writable: bool = False) -> AccessGuard:
    """Return the guarded dashboard of some studies as a WSGI application.

    Args:
        studies: Open; they may lie in several storages.
        writable: Let requests that change something through.
    """
    view = StudiesView(studies)
    folders = dict.fromkeys(study.out / "artifacts" for study in studies if study.out is not None)
    store = ArtifactFolder(*folders) if folders else None
    app = optuna_dashboard.wsgi(view, artifact_store=store)
    pages = Pages(view, writable=writable)
    app.get("/api/studies/<study_id:int>")(pages.study)
    app.get("/api/studies/<study_id:int>/param_importances")(pages.importances)
    app.get("/dashboard<:re:(/.*)?>")(pages.page)
    app.get(f"/{SCRIPT.name}")(pages.script)
    return AccessGuard(app, writable=writable)


class Pages:
    """What is answered otherwise than by the Optuna dashboard.

    That one passes over all notes of a study for each trial, which takes a minute for some
    thousand trials, and offers buttons that are refused here.

    Args:
        view: The studies.
        writable: Whether changes are let through.
    """

    def __init__(self, view: StudiesView, *, writable: bool) -> None:
        self._view, self._writable = view, writable
        self._finished: dict[int, tuple[int, str]] = {}  # version of the note and text, by trial

    def study(self, study_id: int) -> Any:
        """Answer with a study and its trials from number `after` on."""
        after = max(0, int(bottle.request.query.get("after", 0)))
        found = {id_of_study(study): study for study in self._view.get_all_studies()}
        if study_id not in found:
            return bottle.HTTPResponse('{"reason": "There is no such study."}', 404)
        trials = self._view.get_all_trials(study_id, deepcopy=False)
        of_study, by_trial = _sorted_notes(found[study_id].system_attrs)
        found[study_id].system_attrs = of_study
        try:
            best = [self._view.get_best_trial(study_id)]
        except ValueError:
            best = []
        spaces = shared_and_all_distributions(trials)
        attributes: dict[str, bool] = {}
        for trial in trials:
            for key, value in trial.user_attrs.items():
                sortable = isinstance(value, int | float) and not isinstance(value, bool)
                attributes[key] = attributes.get(key, True) and sortable
        head = serialize_study_detail(
            found[study_id], [], [], *spaces, list(attributes.items()),
            any(trial.intermediate_values for trial in trials), {}, [],
        )  # fmt: skip

        def texts(shown: Iterable[Any]) -> str:
            return ",".join(self._trial(study_id, t, by_trial.get(trial_id(t), {})) for t in shown)

        del head["trials"], head["best_trials"]
        body = (
            f'{json.dumps(head)[:-1]}, "trials": [{texts(trials[after:])}], '
            f'"best_trials": [{texts(best)}]}}'
        )
        return bottle.HTTPResponse(body, headers={"Content-Type": "application/json"})

    def _trial(self, study_id: int, trial: Any, notes: Mapping[str, Any]) -> str:
        """Return a trial as JSON; that of a finished one is made once for each of its notes."""
        version = int(notes.get(f"dashboard:{trial_id(trial)}:note_ver", 0))
        known = self._finished.get(trial_id(trial))
        if known is not None and known[0] == version:
            return known[1]
        without = copy(trial)
        without.params = {}
        head = json.dumps({**serialize_frozen_trial(study_id, without, dict(notes)), "params": []})
        params = ",".join(
            f'{{"name": {json.dumps(name)}, "param_internal_value": '
            f"{json.dumps(trial.distributions[name].to_internal_repr(value))}, "
            f'"param_external_value": {json.dumps(str(value))}, '
            f'"param_external_pytyp": {json.dumps(str(type(value)))}, '
            f'"distribution": {_distribution_text(trial.distributions[name])}}}'
            for name, value in trial.params.items()
        )
        text = head.replace('"params": []', f'"params": [{params}]', 1)
        if trial.state.is_finished():
            self._finished[trial_id(trial)] = version, text
        return text

    def importances(self, study_id: int) -> dict[str, Any]:
        """Answer with the importances that the report shows too."""
        study = self._view.study_of(study_id)
        shares = {} if study is None else study.importances()
        rows = [
            {"name": name, "importance": share, "distribution": study.kind_of(name)}
            for name, share in shares.items()
            if study is not None
        ]
        return {"param_importances": [rows]}

    def page(self) -> Any:
        """Answer with the page of the dashboard and our script in it."""
        text = (Path(optuna_dashboard.__file__).parent / "index.html").read_text()
        tag = f'<script defer src="/{SCRIPT.name}"></script>'
        headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": POLICY}
        return bottle.HTTPResponse(text.replace("</head>", f"{tag}</head>"), headers=headers)

    def script(self) -> Any:
        """Answer with our script, which hides what is refused and says what is missing."""
        text = f"const writable = {json.dumps(self._writable)};\n{SCRIPT.read_text()}"
        return bottle.HTTPResponse(text, headers={"Content-Type": "text/javascript"})


@lru_cache(maxsize=4096)
def _distribution_text(distribution: Any) -> str:
    """Return a distribution as JSON; thousands of trials share a few."""
    return json.dumps(serialize_distribution(distribution))


def _sorted_notes(
    attributes: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Return the attributes of a study apart from those of its trials, by the trials' ids."""
    of_study: dict[str, Any] = {}
    by_trial: dict[int, dict[str, Any]] = {}
    for key, value in attributes.items():
        match = OF_A_TRIAL.match(key)
        (of_study if match is None else by_trial.setdefault(int(match[2]), {}))[key] = value
    return of_study, by_trial


def make_dashboard(
    places: str | Sequence[str | Path | None], *, port: int, writable: bool = False
) -> WSGIServer:
    """Return a server of the dashboard that is bound and not yet serving.

    Args:
        places: Storage URL or folder of a study, or several.
        port: On 127.0.0.1; 0 is any free one.
        writable: Let requests that change something through.

    Raises:
        StudyError: The storage does not exist or answer, or holds no study.
        InputError: The port is taken.
    """
    given = [places] if isinstance(places, str) else places
    studies = [study for place in given for study in studies_at(place)]
    guarded = application(studies, writable=writable)
    try:
        return make_server(HOST, port, guarded, server_class=_Server, handler_class=_Handler)
    except OSError as error:
        raise InputError(
            f"--port: {HOST}:{port} cannot be bound: {error.strerror}. Try --port {port + 1}."
        ) from error


def serve(
    places: str | Sequence[str | Path | None],
    *,
    port: int = 8080,
    writable: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the dashboard until it is interrupted.

    Args:
        places: Storage URL or folder of a study, or several.
        port: On 127.0.0.1; 0 is any free one.
        writable: Let requests that change something through.
        ready: Told the address once it answers.

    Raises:
        StudyError: The storage does not exist or answer, or holds no study.
        InputError: The port is taken.
    """
    server = make_dashboard(places, port=port, writable=writable)
    with server:
        if ready is not None:
            ready(f"http://{HOST}:{server.server_port}/")
        server.serve_forever()
