"""An OpenAPI description as a page, without scripts and without anything from other servers."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: the API</title>
<link rel="stylesheet" href="/playground.css"><link rel="stylesheet" href="/reference.css">
<header><p class="kind">layerskip {version}</p><h1>The API</h1>
<p>Routes of this server, and what they take. For programs: <a href="/openapi.json">openapi.json</a>.
To try the model: <a href="/">the playground</a>.</p></header>
<main>{routes}</main>
</html>
"""
ROUTE = """<section><h2><span class="method">{method}</span> <code>{path}</code></h2><p>{summary}</p>{fields}</section>
"""
FIELDS = (
    """<table><thead><tr><th>field</th><th>type</th><th>what it is</th></tr></thead><tbody>{rows}</tbody></table>"""
)
ROW = "<tr><td><code>{name}</code>{needed}</td><td>{kind}</td><td>{text}</td></tr>"


def reference_page(description: Mapping[str, Any]) -> str:
    """HTML of a description, as FastAPI makes it."""
    parts = description.get("components", {}).get("schemas", {})
    routes = [
        ROUTE.format(
            method=method.upper(),
            path=escape(path),
            summary=escape(operation.get("summary", "")),
            fields=_fields(operation, parts),
        )
        for path, operations in description["paths"].items()
        for method, operation in operations.items()
    ]
    info = description["info"]
    return PAGE.format(title=escape(info["title"]), version=escape(info["version"]), routes="".join(routes))


def _fields(operation: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    schema = _resolved(content.get("schema", {}), parts)
    needed = schema.get("required", ())
    rows = [
        ROW.format(
            name=escape(name),
            needed=" <em>needed</em>" if name in needed else "",
            kind=escape(_kind(field, parts)),
            text=escape(str(field.get("description", ""))),
        )
        for name, field in schema.get("properties", {}).items()
    ]
    return FIELDS.format(rows="".join(rows)) if rows else ""


def _resolved(schema: Mapping[str, Any], parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """A schema itself, in place of its name."""
    reference = str(schema.get("$ref", ""))
    found: Mapping[str, Any] = parts[reference.rpartition("/")[2]] if reference else schema
    return found


def _kind(schema: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """A field's type and range in words."""
    return " or ".join(dict.fromkeys(_kinds(schema, parts))) or "anything"


def _kinds(schema: Mapping[str, Any], parts: Mapping[str, Any]) -> Iterator[str]:
    if "anyOf" in schema:
        for each in schema["anyOf"]:
            if each.get("type") != "null":
                yield from _kinds(each, parts)
        return
    if "$ref" in schema:
        found = _resolved(schema, parts)
        yield f"object ({', '.join(found.get('properties', {}))})"
        return
    if "enum" in schema or "const" in schema:
        yield from map(str, schema.get("enum", [schema.get("const")]))
        return
    kind = str(schema.get("type", "anything"))
    if kind == "array":
        kind = f"list of {_kind(schema.get('items', {}), parts)}"
    bounds = [
        f"{words} {schema[name]}"
        for name, words in (
            ("minimum", "from"),
            ("exclusiveMinimum", "above"),
            ("maximum", "to"),
            ("exclusiveMaximum", "below"),
        )
        if name in schema
    ]
    yield " ".join([kind, *bounds])
