"""What `mkdocs build` asks of us: the options of the commands, and where the package lies."""

from __future__ import annotations

import configparser
import re
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from mkdocs.plugins import event_priority

from dsgnn.export.web.npm import kept_runtime
from dsgnn.export.web.site import build_site
from dsgnn.runtime.ranker import BUNDLED

ROOT = Path(__file__).parents[1]
HELP = re.compile(r"^\{\{ help ([\w. -]+) \}\}$", re.MULTILINE)
LIVE = "{{ live page }}"
FRAME = """<a href="live/index.html">Open the page alone</a>, where it may use several threads.

<iframe src="live/index.html" title="Rank a photo in this browser" loading="lazy"
style="width: 100%; height: 46rem; border: 1px solid #8886; border-radius: .5rem"></iframe>"""
NO_FRAME = (
    "*These pages were built without it, because onnxruntime-web was not on the machine: "
    "`dsgnn-export web nano -o site` fetches it.*"
)
_kept: list[Any] = []  # the folder of links lives as long as the build


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: Any) -> Any:
    """Show mkdocstrings the four folders as the one package that setup.cfg makes of them."""
    place = tempfile.TemporaryDirectory()
    _kept.append(place)
    package = Path(place.name) / "dsgnn"
    package.mkdir()
    for entry in (ROOT / "dsgnn").iterdir():
        (package / entry.name).symlink_to(entry)
    for folder in ("runtime", "export", "benchmarks"):
        (package / folder).symlink_to(ROOT / folder)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [place.name]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help of a command where a page says `{{ help dsgnn-run }}`, and a frame of the page
    that ranks in the browser where one says `{{ live page }}`."""
    markdown = markdown.replace(LIVE, FRAME if kept_runtime() else NO_FRAME)
    return HELP.sub(lambda found: command_page(found[1]), markdown)


def on_post_build(config: Any) -> None:
    """Put the site of the bundled model beside the pages. Nothing is fetched for it here."""
    if runtime := kept_runtime():
        build_site(BUNDLED, Path(config.site_dir) / "live", runtime)


def find_command(name: str) -> click.Command:
    """The command of a line such as `dsgnn-export onnx` or `python -m dsgnn.teacher`."""
    if name.startswith("python -m "):
        return import_module(f"{name.split()[-1]}.cli").main
    words = name.split()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"]
    module, function = dict(re.findall(r"^(\S+) = (\S+)$", scripts, re.MULTILINE))[words[0]].split(
        ":"
    )
    command = getattr(import_module(module), function)
    for word in words[1:]:
        command = command.commands[word]
    return command


def command_page(name: str) -> str:
    """Usage, description, options and epilogue of a command as Markdown."""
    command = find_command(name)
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"```text\n{name} {usage}\n```", *_paragraphs(command.help or "")]
    rows = [
        _row(parameter, context)
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option) and parameter.name not in ("help", "version")
    ]
    if rows:
        parts.append("\n".join(["| option | meaning |", "| --- | --- |", *rows]))
    return "\n\n".join([*parts, *_paragraphs(command.epilog or "")])


def _paragraphs(text: str) -> list[str]:
    """Click's help text: a paragraph that begins with \\b keeps its lines."""
    found = []
    for paragraph in re.split(r"\n\s*\n", re.sub(r"^ {4}", "", text, flags=re.MULTILINE).strip()):
        if paragraph.lstrip().startswith("\b"):
            kept = paragraph.lstrip().removeprefix("\b").strip("\n")
            found.append(f"```text\n{kept}\n```")
        elif paragraph:
            found.append(_escaped(" ".join(paragraph.split())))
    return found


def _row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    metavar = "" if option.is_flag else option.make_metavar(context)
    if len(metavar) > 20:  # a choice of many: one per line would not fit beside the name
        metavar = " ".join(f"`{name}`" for name in metavar.strip("[]").split("|"))
        names += f"<br>one of {metavar}"
    elif metavar:
        names += f" `{metavar}`".replace("|", "\\|")
    _, text = option.get_help_record(context) or ("", "")
    return f"| {names} | {_escaped(' '.join(text.split()))} |"


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_])", r"\\\1", text).replace("[", "\\[")
