"""The page at `/` that shows what self-speculation does: static files, without a build step.

playground.js              controls, turns, comparisons
playground-stream.js       requests and streams
playground-answer.js       text in coloured pieces
playground-figures.js      layers, acceptance by position
playground-settings.js     fields of a request, links
"""

from collections.abc import Mapping
from importlib.resources import files

POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'"
"""The Content-Security-Policy that the files are to be served with."""
TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}


def playground_files() -> Mapping[str, tuple[bytes, str]]:
    """Content and type of each file, by the path that it is served at: `/`, `/playground.css`, `/playground.js`, ..."""
    found = {}
    for file in sorted(files(__name__).iterdir(), key=lambda file: file.name):
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind is not None:
            found["/" if file.name == "index.html" else f"/{file.name}"] = (file.read_bytes(), kind)
    return found
