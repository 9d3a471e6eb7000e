"""Write what is said about settings in `.env.example` and `docs/settings.md` from the settings themselves.

python scripts/settings_reference.py            rewrite both
python scripts/settings_reference.py --check    end with 1 if one of them is out of date
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from wmtp_worker.errors import EXIT_CODES
from wmtp_worker.settings import Settings, load
from wmtp_worker.settings.environment import OTHER, SHORT, variable
from wmtp_worker.settings.files import configs, names, read
from wmtp_worker.settings.schema import FIELDS, SETTABLE
from wmtp_worker.settings.secrets import SECRETS
from wmtp_worker.settings.values import allowed

ROOT = Path(__file__).resolve().parent.parent
ENV_EXAMPLE = ROOT / ".env.example"
GUIDE = ROOT / "docs" / "settings.md"


def main(check: bool) -> int:
    stale = []
    for path, text in ((ENV_EXAMPLE, env_example()), (GUIDE, guide(GUIDE.read_text(encoding="utf-8")))):
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(path.relative_to(ROOT).as_posix())
        if not check:
            path.write_text(text, encoding="utf-8")
    if stale and check:
        print(f"out of date: {', '.join(stale)}; run python scripts/settings_reference.py", file=sys.stderr)
        return 1
    return 0


def defaults() -> dict[str, str]:
    """Dotted key to the default, as YAML and JSON spell it."""
    values = read(configs() / "defaults.yaml", [])
    return {key: json.dumps(given.value).strip('"') for key, given in values.items()}


def env_example() -> str:
    lines = [
        "# Copy to .env and uncomment what you need; docs/settings.md explains the layers.",
        "# The environment wins over this file, the command line over both. Empty means not set.",
    ]
    default = defaults()

    def group(title: str) -> None:
        lines.extend(("", f"### {title}"))

    def entry(name: str, comment: str, value: str = "") -> None:
        lines.extend((f"# {comment}", f"#{name}={value}"))

    group("What runs, and where it lies")
    for name, comment in OTHER.items():
        entry(name, comment)
    for name, key in SHORT.items():
        entry(name, f"{key}: {_description(key)}", default[key])
    group("Secrets; for each NAME, NAME_FILE may name a file that holds it instead")
    for name, comment in SECRETS.items():
        entry(name, comment)
        entry(f"{name}_FILE", f"file that holds {name}")
    group("Every setting, with its default")
    for key in SETTABLE:
        entry(variable(key), _description(key), default[key])
    return "\n".join(lines) + "\n"


def guide(text: str) -> str:
    """The guide with every block between `<!-- name -->` and `<!-- /name -->` made anew."""
    blocks = {
        "settings": _settings_table(),
        "presets": _presets_table(),
        "variables": _variables_table(),
        "secrets": _secrets_table(),
        "exit codes": _exit_codes_table(),
    }
    for name, rows in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        made = "\n".join(rows) + "\n"
        text, count = pattern.subn(lambda match, made=made: match[1] + made + match[2], text)
        if count != 1:
            raise SystemExit(f"docs/settings.md must have one block <!-- {name} -->")
    return text


def _settings_table() -> Iterator[str]:
    yield "| setting | default | meaning |"
    yield "|---|---|---|"
    default = defaults()
    for key in SETTABLE:
        choices = f" ({', '.join(allowed(key))})" if len(allowed(key)) > 1 else ""
        yield f"| `{key}` | `{default[key]}` | {_cell(_description(key) + choices)} |"


def _presets_table() -> Iterator[str]:
    presets = {name: load(preset=name, environ={"WMTP_ENV_FILE": "/dev/null"}) for name in names("preset")}
    yield f"| setting | {' | '.join(presets)} |"
    yield f"|---|{'---|' * len(presets)}"
    flats = [settings.flat() for settings in presets.values()]
    for key in SETTABLE:
        values = [flat[key] for flat in flats]
        if key != "run.name" and len({json.dumps(value) for value in values}) > 1:
            yield f"| `{key}` | {' | '.join(_preset_cell(s, key) for s in presets.values())} |"


def _preset_cell(settings: Settings, key: str) -> str:
    flat = settings.flat()
    if flat["model.path"] is not None and key not in settings.identity() and key != "model.path":
        return "the model's own" if key.startswith("model.") else f"`{flat[key]}`"
    return f"`{json.dumps(flat[key]).strip(chr(34))}`"


def _variables_table() -> Iterator[str]:
    yield "| variable | meaning |"
    yield "|---|---|"
    for name, key in SHORT.items():
        yield f"| `{name}` | `{key}`, like `{variable(key)}` |"
    for name, comment in OTHER.items():
        yield f"| `{name}` | {_cell(comment)} |"


def _secrets_table() -> Iterator[str]:
    yield "| variable | from a file | what it is |"
    yield "|---|---|---|"
    for name, comment in SECRETS.items():
        yield f"| `{name}` | `{name}_FILE` | {_cell(comment)} |"


def _exit_codes_table() -> Iterator[str]:
    yield "| code | meaning |"
    yield "|---|---|"
    for code, meaning in EXIT_CODES.items():
        yield f"| {code} | {meaning} |"


def _description(key: str) -> str:
    return FIELDS[key].description or ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
