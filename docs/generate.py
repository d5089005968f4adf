"""Writes docs/api.md, docs/schemas/ and docs/errors.md from the package's own docstrings and types: `make docs`."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import nformer_edge
from nformer_edge.core import errors as error_types
from nformer_edge.core.values import Result, arguments, descriptions, dumps, schema

DOCS = Path(__file__).parent
START = """\
# Reference

Written by `make docs` from docstrings and types: do not edit it.

- [The functions and classes](#functions-and-classes) that `import nformer_edge as ne` gives.
- [Results](#results): what functions return and commands write with `-o`. Each has `to_json()`, `from_json(data)`,
  `save(path)` and, as `str(result)`, the table that its command prints.
- [Manifests](#manifests) of the folders that commands write, besides `kind`, `format_version` and `files`.
- [Parts](#parts) of results and manifests.

Each result and manifest has a JSON schema in [`schemas/`](schemas).

"""


def values() -> tuple[list[type], list[type]]:
    """Every result and every manifest of the package, each sorted by name."""
    found: set[type] = set()
    for module in pkgutil.walk_packages(nformer_edge.__path__, "nformer_edge."):
        if not module.name.rpartition(".")[2].startswith(("_", "lib")):  # native code
            held = vars(importlib.import_module(module.name)).values()
            found |= {cls for cls in held if isinstance(cls, type) and dataclasses.is_dataclass(cls)}
    results = [cls for cls in found if issubclass(cls, Result) and cls.kind]
    manifests = [cls for cls in found if cls.__name__.endswith("Manifest") and not cls.__subclasses__()]
    return _sorted(results), _sorted(manifests)


def _sorted(classes: list[type]) -> list[type]:
    return sorted(classes, key=lambda cls: (cls.__name__, cls.__module__))


def file_name(cls: type) -> str:
    """``BundleManifest`` to ``bundle-manifest.json``; a result by its kind."""
    dashed = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()
    return f"{cls.kind if issubclass(cls, Result) else dashed}.json"


def parts(classes: list[type]) -> list[type]:
    """The other dataclasses that fields of `classes` hold, at any depth."""
    found: set[type] = set()
    waiting: list[object] = list(classes)
    while waiting:
        hint = waiting.pop()
        waiting += typing.get_args(hint)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in found:
            found.add(hint)
            waiting += typing.get_type_hints(hint).values()
    return _sorted(list(found - set(classes)))


def plain(text: str) -> str:
    """Docstring text as Markdown, in one line."""
    return " ".join(text.split()).replace("``", "`")


def paragraph(doc: str | None) -> str:
    """The first paragraph of a docstring."""
    return plain(inspect.cleandoc(doc or "").partition("\n\n")[0])


def signature(name: str, value: object) -> str:
    """As it is written in the code, an argument a line where it is long."""
    found = inspect.signature(value)  # type: ignore[arg-type]
    shown = [re.sub(r""": (['"])(.*?)\1( =|$)""", r": \2\3", str(p)) for p in found.parameters.values()]
    shown = [a.replace("<factory>", "...") for a in shown if a != "self"]
    for i, p in enumerate(found.parameters.values()):
        if p.kind is p.KEYWORD_ONLY:
            shown.insert(i - (len(found.parameters) - len(shown)), "*")
            break
    returned = "" if found.return_annotation in (found.empty, "None", None) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(shown)}){returned}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {a},\n" for a in shown) + f"){returned}"


def entry(name: str, value: object) -> str:
    """A function or class: its signature, what it does, its arguments (of a result, its fields) and its methods."""
    doc = inspect.cleandoc(value.__doc__ or "")
    told = "\n".join(f"- `{key}`: {plain(text)}" for key, text in arguments(doc).items())
    parts = [f"### {name}", f"```text\n{signature(name, value)}\n```", paragraph(doc), told]
    if value in FACE_RESULTS:
        parts = [fields(value).strip()]
    for method in vars(value) if isinstance(value, type) else ():
        held = getattr(value, method)
        if not method.startswith("_") and callable(held):
            parts += [f"```text\n{name}.{signature(method, held)}\n```", paragraph(held.__doc__)]
    return "\n\n".join(filter(None, parts)) + "\n"


#: Names of the face, and what `open` gives.
FACE = {name: getattr(nformer_edge, name) for name in nformer_edge.__all__}
FACE |= {cls.__name__: cls for cls in [typing.get_type_hints(nformer_edge.open)["return"]]}
FACE_RESULTS = [value for value in FACE.values() if isinstance(value, type) and issubclass(value, Result)]


def fields(cls: type) -> str:
    """A dataclass as a table of its fields."""
    told = descriptions(cls)
    lines = ["| field | type | |", "|---|---|---|"]
    for field in dataclasses.fields(cls):
        kind = str(field.type).replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{kind}` | {plain(told.get(field.name, ''))} |")
    kind = f" Kind `{cls.kind}`, version {cls.version}." if issubclass(cls, Result) else ""
    about = f"{paragraph(cls.__doc__)}{kind} In `{cls.__module__}`."
    return f"### {cls.__name__}\n\n{about}\n\n" + "\n".join(lines) + "\n"


ERRORS_START = """\
# Errors

Written by `make docs` from the code: do not edit it. What each error of the package says:
`SUBJECT: got ..., expected .... HINT`. A part in braces depends on the case. Exit codes: 1, a gate failed; 2, bad
input; 3, an error of this package's own.

"""

#: Names of the error classes.
KINDS = {name for name, value in vars(error_types).items() if isinstance(value, type)}


@dataclasses.dataclass(frozen=True)
class Told:
    """One place that raises an error: where, its kind, and the texts that it may be given as got, expected and hint."""

    module: str
    kind: str
    subject: str
    got: str
    expected: str
    hint: str


def errors() -> list[Told]:
    """Every error that the package raises, in the order of modules and lines."""
    found = []
    root = Path(error_types.__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        nested = {id(n) for f in functions for n in ast.walk(f) if isinstance(n, ast.FunctionDef) and n is not f}
        for function in (f for f in functions if id(f) not in nested):
            found += _raised(module, function)
    return found


def _raised(module: str, function: ast.FunctionDef) -> list[Told]:
    nodes = sorted((n for n in ast.walk(function) if hasattr(n, "lineno")), key=lambda n: (n.lineno, n.col_offset))
    named: dict[str, list[tuple[int, ast.expr]]] = {}
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                names, given = [target], [node.value]
                if isinstance(target, ast.Tuple):
                    both = isinstance(node.value, ast.Tuple) and len(node.value.elts) == len(target.elts)
                    names, given = target.elts, node.value.elts if both else [node.value] * len(target.elts)
                for name, value in zip(names, given, strict=True):
                    if isinstance(name, ast.Name):
                        named.setdefault(name.id, []).append((node.lineno, value))
    calls = [n for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in KINDS]
    rows, last = [], 0
    for call in calls:
        words = dict(zip(("subject", "got", "expected", "hint"), call.args, strict=False))
        words |= {k.arg: k.value for k in call.keywords if k.arg}
        texts = {name: _text(value, named, last, call.lineno) for name, value in words.items()}
        rows.append(Told(module, call.func.id, *(texts.get(n, "") for n in ("subject", "got", "expected", "hint"))))
        last = call.lineno
    return rows


def _text(value: ast.expr, named: dict[str, list[tuple[int, ast.expr]]], after: int, before: int) -> str:
    """A string expression as text: what depends on the case in braces, alternatives between bars."""
    if isinstance(value, ast.Constant):
        return "" if value.value is None else str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else _braces(p.value) for p in value.values)
    if isinstance(value, ast.IfExp):
        return " / ".join(_text(v, named, after, before) for v in (value.body, value.orelse))
    if isinstance(value, ast.Name) and value.id in named:
        earlier = [(line, v) for line, v in named[value.id] if line < before]
        near = [v for line, v in earlier if line > after] or [v for _, v in earlier[-1:]]
        if near:
            return " / ".join(dict.fromkeys(_text(v, {}, 0, 0) for v in near))
    return _braces(value)


def _braces(value: ast.expr) -> str:
    names = [
        n.attr if isinstance(n, ast.Attribute) else n.id
        for n in ast.walk(value)
        if isinstance(n, (ast.Name, ast.Attribute))
    ]
    return "{" + (names[0].strip("_").lower() if names else "...") + "}"


def errors_page() -> str:
    """`errors` as a table a module."""
    lines: list[str] = []
    found = errors()
    for module in dict.fromkeys(told.module for told in found):
        rows = [t for t in found if t.module == module]
        lines += [f"## {module}", "", "| error | got | expected | hint |", "|---|---|---|---|"]
        for t in rows:
            cells = (
                plain(x).replace("|", "\\|").replace("<", "&lt;")
                for x in (f"{t.kind}: {t.subject}", t.got, t.expected, t.hint)
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return ERRORS_START + "\n".join(lines)


def generate() -> dict[str, str]:
    """The text of each file, by its path in docs/."""
    results, manifests = values()
    sections = {
        "Functions and classes": [entry(name, FACE[name]) for name in sorted(FACE)],
        "Results": [fields(cls) for cls in results if cls not in FACE_RESULTS],
        "Manifests": [fields(cls) for cls in manifests],
        "Parts": [fields(cls) for cls in parts(results + manifests)],
    }
    pages = [f"## {title}\n\n" + "\n".join(filter(None, found)) for title, found in sections.items() if found]
    files = {f"schemas/{file_name(cls)}": dumps(schema(cls)) + "\n" for cls in results + manifests}
    return {"api.md": START + "\n".join(pages), "errors.md": errors_page(), **files}


def main() -> None:
    files = generate()
    for old in (DOCS / "schemas").glob("*.json"):
        if f"schemas/{old.name}" not in files:
            old.unlink()
    for name, text in files.items():
        path = DOCS / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
