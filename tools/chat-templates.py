"""Writes expected.json: what Python's jinja2 makes of constructs.jinja and of the other templates of a folder, with the
settings, filters and functions of transformers. usage: chat-templates.py FOLDER (needs jinja2 3.1.6)"""

import json, sys
from pathlib import Path

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
environment.filters["tojson"] = tojson
environment.globals["raise_exception"] = raise_exception


def rendered(source, context, tools):
    variables = {**context["variables"], "tools": context["tools"] if tools else None}
    try:
        return environment.from_string(source).render(messages=context["messages"], **variables)
    except Exception:
        return None


folder = Path(sys.argv[1])
context = json.loads((folder / "context.json").read_text())
sources = {}
for number, line in enumerate((folder / "constructs.jinja").read_text().split("\n"), 1):
    if line and not line.startswith("# "):
        sources[f"constructs.jinja line {number}"] = line.replace("⏎", "\n").replace("␍", "\r")
for path in sorted(folder.glob("*.jinja")):
    if path.name != "constructs.jinja":
        sources[path.name] = path.read_bytes().decode()
cases = [
    {"name": name, "template": source, "plain": rendered(source, context, False), "tools": rendered(source, context, True)}
    for name, source in sources.items()
]
with open(folder / "expected.json", "w") as out:
    json.dump(cases, out, ensure_ascii=True, indent=0)
    out.write("\n")
