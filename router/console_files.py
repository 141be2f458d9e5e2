"""The console's page and what it loads, all from here."""

from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

FOLDER = Path(__file__).with_name("console")
PAGE = "index.html"

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
}
HEADERS = {
    # The page can't load, send or be framed anywhere else, whatever a model's answer has in it.
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_console(app: FastAPI) -> None:
    """Adds `/`, and below `/console/` the files that its page names."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in CONTENT_TYPES}

    @app.get("/", response_class=Response, include_in_schema=False)
    async def page() -> Response:
        return _answer(PAGE, files[PAGE])

    @app.get("/console/{name}", response_class=Response, include_in_schema=False)
    async def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        return _answer(name, files[name])


def _answer(name: str, content: bytes) -> Response:
    return Response(content, headers=HEADERS | {"content-type": CONTENT_TYPES[Path(name).suffix]})
