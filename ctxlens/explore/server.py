"""The page's server: what it answers to whom, and headers that keep a browser from leaving this machine."""

from __future__ import annotations

import errno
import hmac
import logging
import secrets
import socket
from collections.abc import Collection
from importlib.resources import files
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import dash
import flask
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from ctxlens.errors import CtxlensError, InputError, first_line
from ctxlens.explore.lab import Lab

COOKIE = "ctxlens-explore"
MOST_BYTES = 8 * 2**20
"""The largest request: a conversation, or an uploaded file."""

LOCAL = "127.0.0.1"
_NAMES_OF_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_LOG = logging.getLogger(__name__)

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def make_app(lab: Lab, *, host: str = LOCAL, port: int = 8061, token: str | None = None) -> dash.Dash:
    """The page as an application, guarded.

    Args:
        lab: the models.
        host: the address that the server binds to; it decides which names a browser may use for it.
        port: the port.
        token: what the first link must carry; needed on every address but this machine's own.

    Raises:
        InputError: another address without a token.
    """
    if not is_local(host) and not token:
        raise InputError(f"{host} can be reached by others, so the page needs a token.")
    from ctxlens.explore import direct
    from ctxlens.explore.layout import build_page, register

    app = dash.Dash(
        "ctxlens.explore",
        assets_folder=str(files("ctxlens.explore") / "assets"),
        title="ctxlens explore",
        update_title="",
        serve_locally=True,
        enable_mcp=False,
        suppress_callback_exceptions=True,
        on_error=_tell,
        add_log_handler=False,
        index_string=_INDEX,
    )
    app.layout = build_page(lab)
    register(app, lab)
    direct.register(app, lab)
    guard(app, allowed_hosts(host, port), token)
    return app


_INDEX = """<!DOCTYPE html>
<html lang="en">
<head>{%metas%}<meta name="color-scheme" content="light dark"><title>{%title%}</title>{%css%}</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""


def _tell(error: Exception) -> None:
    """Show the sentence of an error on the page; only unexpected ones are logged."""
    if isinstance(error, CtxlensError):
        words = str(error)
    else:
        _LOG.error("a part of the page failed", exc_info=error)
        words = f"something went wrong ({type(error).__name__}: {first_line(error)})."
    dash.set_props("notice", {"children": words})


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def allowed_hosts(host: str, port: int) -> frozenset[str]:
    """The values of the header `Host` that are answered.

    A page elsewhere can let its own name point to this machine (DNS rebinding), but its name is then in the
    header. On `0.0.0.0` and `::` the address that people use is not known, so that any IP address counts, but
    no name.
    """
    names = _NAMES_OF_LOCAL if is_local(host) else (f"[{host}]" if ":" in host else host,)
    return frozenset(f"{name}:{port}" for name in names)


def _is_allowed(given: str, hosts: Collection[str]) -> bool:
    if given in hosts:
        return True
    if not any(name.startswith(("0.0.0.0:", "[::]:")) for name in hosts):
        return False
    parts = urlsplit(f"//{given}")
    try:
        ip_address(parts.hostname or "")
        return f":{parts.port}" == next(iter(hosts))[-len(f":{parts.port}") :]
    except ValueError:
        return False


def guard(app: dash.Dash, hosts: Collection[str], token: str | None) -> None:
    """Check every request before it is answered, and send strict headers with every answer."""
    server = app.server
    server.config["MAX_CONTENT_LENGTH"] = MOST_BYTES
    cookie = secrets.token_urlsafe(32)
    policy = security_policy(app)

    @server.before_request
    def check() -> Any:
        request = flask.request
        if not _is_allowed(request.host, hosts):
            return _refuse(421, "this address is not the explorer's; use the link that the command printed.")
        origin = request.headers.get("Origin")
        if origin is not None and not _is_allowed(urlsplit(origin).netloc, hosts):
            return _refuse(403, "requests of other pages are refused.")
        site = request.headers.get("Sec-Fetch-Site", "none")
        if site not in ("same-origin", "none") and (request.path != "/" or request.method != "GET"):
            return _refuse(403, "requests of other pages are refused.")
        if request.method not in ("GET", "HEAD", "POST"):
            return _refuse(405, "this method is not supported.")
        if request.method == "POST" and request.mimetype != "application/json":
            return _refuse(415, "the explorer takes JSON only.")
        return None if token is None else _check_token(token, cookie)

    @server.after_request
    def harden(response: flask.Response) -> flask.Response:
        response.headers.update({**_HEADERS, "Content-Security-Policy": policy})
        if "component-suites" not in flask.request.path:
            response.headers["Cache-Control"] = "no-store"
        return response


def _check_token(token: str, cookie: str) -> Any:
    """Exchange the token of the first link for a cookie; refuse whoever has neither."""
    request = flask.request
    if hmac.compare_digest(request.cookies.get(COOKIE, ""), cookie):
        return None
    given = request.args.get("token", "")
    if request.path == "/" and hmac.compare_digest(given.encode(), token.encode()):
        response = flask.redirect("/")
        response.set_cookie(COOKIE, cookie, httponly=True, samesite="Strict")
        return response
    return _refuse(403, "open the whole link that the command printed, with its token.")


def _refuse(code: int, words: str) -> flask.Response:
    return flask.Response(f"{words}\n", code, mimetype="text/plain")


def security_policy(app: dash.Dash) -> str:
    """The Content-Security-Policy: nothing from elsewhere, no script but the page's own files.

    Dash starts with one line of script in the page, which is allowed by its hash. Plotly writes style
    elements, which therefore must be allowed; they cannot run anything.
    """
    scripts = " ".join(["'self'", *app.csp_hashes()])
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {scripts}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


class _Quiet(WSGIRequestHandler):
    """Answers without a line in the log for every request."""

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Say nothing."""


def bind(app: dash.Dash, host: str = LOCAL, port: int = 8061) -> BaseWSGIServer:
    """A server that answers in threads once its `serve_forever` is called.

    Raises:
        InputError: the port is taken, or the address is not this machine's.
    """
    try:
        return make_server(host, port, app.server, threaded=True, request_handler=_Quiet)
    except (OSError, SystemExit) as error:
        why = "it is in use" if isinstance(error, SystemExit) else first_line(error)
        raise _closed(host, port, why) from None


def check_port(host: str, port: int) -> None:
    """Find out whether a port is free before a model is loaded; only this machine's own addresses are tried.

    Raises:
        InputError: it is in use, or may not be opened.
    """
    if not is_local(host):
        return
    name = host.strip("[]")
    with socket.socket(socket.AF_INET6 if ":" in name else socket.AF_INET) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((name, port))
        except OSError as error:
            why = "it is in use" if error.errno == errno.EADDRINUSE else first_line(error)
            raise _closed(host, port, why) from None


def _closed(host: str, port: int, why: str) -> InputError:
    return InputError(f"port {port} of {host} cannot be opened: {why}; give another --port.")


def new_token() -> str:
    """A random token for a link."""
    return secrets.token_urlsafe(24)


__all__ = [
    "LOCAL", "allowed_hosts", "bind", "check_port", "guard", "is_local", "make_app", "new_token",
    "security_policy",
]  # fmt: skip
