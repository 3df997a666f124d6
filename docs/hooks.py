"""What the site's build does beyond MkDocs: formulas, the command line's options, and what it insists on.

The build fails when a public name has no docstring or is missing from the reference. Nothing here imports torch.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import griffe
import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = re.compile(r"^::: (minexp[\w.]*)", re.M)


def on_config(config: Any) -> Any:
    """Drop pages that are not written yet, and list one page an error."""
    config.nav = _present(config.nav)
    errors = [{_title(page): f"errors/{page.name}"} for page in error_pages()]
    for section in config.nav:
        if section.get("Errors"):
            section["Errors"] = [{"All of them": "errors/index.md"}, *errors]
    return config


def _present(entries: list[Any]) -> list[Any]:
    kept = []
    for entry in entries:
        ((name, target),) = entry.items()
        if isinstance(target, list):
            kept.append({name: _present(target)})
        elif (ROOT / "docs" / target).is_file():
            kept.append(entry)
    return kept


def on_pre_build(config: Any) -> None:
    """Fail on a public name without a docstring, or outside the reference."""
    faults = [*undocumented(), *unlisted()]
    if faults:
        raise PluginError("the reference is incomplete:\n  " + "\n  ".join(faults))


def on_files(files: Any, config: Any) -> Any:
    """Pictures of benchmarks are shown from where the benchmarks write them."""
    for picture in sorted((ROOT / "bench" / "results").glob("*.png")):
        files.append(File.generated(config, f"bench/results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    markdown = markdown.replace(
        "](../bench/results/", f"]({'../' * page.file.src_uri.count('/')}bench/results/"
    )
    if page.file.src_uri == "reference/commands.md":
        return markdown + "\n".join(_commands())
    if page.file.src_uri == "errors/index.md":
        return markdown + "\n".join(f"- [{_title(path)}]({path.name})" for path in error_pages()) + "\n"
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas become MathML, which browsers show without a script."""

    def mathml(match: re.Match[str]) -> str:
        source = match[3].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        display = "block" if match[1] == "div" else "inline"
        return latex2mathml.converter.convert(source, display=display)

    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', mathml, html, flags=re.S)


# ---------------------------------------------------------------- the reference


@lru_cache(maxsize=1)
def package() -> griffe.Module:
    """minexp as its source says, nothing imported."""
    return griffe.load("minexp", search_paths=[ROOT])  # type: ignore[return-value]


def public_names() -> list[str]:
    """Names of `minexp.__all__`, but for the version."""
    tree = ast.parse((ROOT / "minexp" / "__init__.py").read_text(encoding="utf-8"))
    homes = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOME"
    )
    return [f"{home}.{name}" for name, home in ast.literal_eval(homes).items()]


def listed() -> set[str]:
    """What the pages of the reference show, by full names."""
    pages = (ROOT / "docs" / "reference").glob("*.md")
    return {name for page in pages for name in REFERENCE.findall(page.read_text(encoding="utf-8"))}


def unlisted() -> Iterator[str]:
    shown = {_resolved(name).path for name in listed()}
    for name in public_names():
        if _resolved(f"minexp.{name}").path not in shown:
            yield f"{name} is public and on no page of docs/reference"


def undocumented() -> Iterator[str]:
    """Public objects of the reference without a docstring: functions, classes, their methods and properties."""
    seen: set[str] = set()
    for name in sorted({*listed(), *(f"minexp.{public}" for public in public_names())}):
        yield from _silent(_resolved(name), seen)


def _resolved(name: str) -> griffe.Object:
    found = package()[name.removeprefix("minexp.")] if name != "minexp" else package()
    return found.final_target if isinstance(found, griffe.Alias) else found


def _silent(thing: griffe.Object, seen: set[str]) -> Iterator[str]:
    if thing.path in seen:
        return
    seen.add(thing.path)
    if not thing.has_docstring and not _plain(thing) and not _inherited(thing):
        yield f"{thing.path} has no docstring"
    if thing.is_class or thing.is_module:
        for name, member in thing.members.items():
            if not name.startswith("_") and not isinstance(member, griffe.Alias):
                yield from _silent(member, seen)


def _plain(thing: griffe.Object) -> bool:
    """Is it a field or a constant, which its class or module describes?"""
    return thing.is_attribute and "property" not in thing.labels


def _inherited(thing: griffe.Object) -> bool:
    """Does a base class say what an overriding method does?"""
    parent = thing.parent
    if not isinstance(parent, griffe.Class):
        return False
    bases = (base.members.get(thing.name) for base in parent.mro())
    return any(base is not None and base.has_docstring for base in bases)


# ---------------------------------------------------------------- the command line


def _commands() -> Iterator[str]:
    """Every command with its options, from the dataclasses that define them."""
    from minexp.commands import COMMANDS

    for name, command in COMMANDS.items():
        yield f"\n## minexp {name}\n\n{command.__doc__}\n\n```sh\n{command.example}\n```\n"
        yield "| option | default | |\n|---|---|---|"
        for field in dataclasses.fields(command):
            option = field.name if _positional(field) else f"--{field.name.replace('_', '-')}"
            if field.default is True:
                option = f"--no-{field.name.replace('_', '-')}"
            yield f"| `{option}` | {_default(field)} | {_meaning(command, field.name)} |"


def _positional(field: Any) -> bool:
    return str(field.type).startswith("Positional")


def _default(field: Any) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "required"
    blank = field.default is None or isinstance(field.default, bool) or field.default in ((), "")
    return "" if blank else f"`{escape(str(field.default))}`"


def _meaning(command: type, name: str) -> str:
    """The text below the field, in the class that defines it last."""
    for base in command.__mro__:
        source = package()[base.__module__.removeprefix("minexp.")] if base.__module__ != "builtins" else None
        member = source and source.members.get(base.__name__)
        field = member and member.members.get(name)
        if field is not None and field.has_docstring:
            return " ".join(field.docstring.value.split()).replace("|", "\\|")
    raise PluginError(f"option {name} of {command.__name__} says nothing about itself")


# ---------------------------------------------------------------- errors


def error_pages() -> list[Path]:
    """One page an error, in the order of their titles."""
    return sorted((p for p in (ROOT / "docs" / "errors").glob("*.md") if p.stem != "index"), key=_title)


def _title(page: Path) -> str:
    return next(line[2:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("# "))
