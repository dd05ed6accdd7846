"""The pages: links, anchors, commands, options, configurations, keys, targets and file names are those of the code."""
import argparse
import functools
import importlib.util
import os
import re
import shlex

import pytest
import yaml

from config import settings
from conftest import ROOT

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
         for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHERS_OPTIONS = {"--bind-to", "--mca", "--host"}   # of mpirun

each_page = pytest.mark.parametrize("page", PAGES)


def blocks(page, language):
    return [content for found, content in FENCED.findall(PAGES[page]) if found == language]


def prose(page):
    """A page without its fenced blocks."""
    return FENCED.sub("", PAGES[page])


def spans(page):
    """The `code` in a page's sentences and tables, each on one line."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands(page):
    """Every command of a page as its words: lines of fenced blocks and of indented ones, and code in sentences."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line.strip() for line in prose(page).splitlines() if line.startswith("    make ")]
    lines += [code for code in spans(page) if code.split()[0] in ("python", "make", "mpirun", "bash")]
    for line in lines:
        words = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def python_calls(page):
    """What follows `python` in the commands of a page, also behind mpirun and docker: a script or -m, and arguments."""
    for words in commands(page):
        places = [place for place, word in enumerate(words) if re.fullmatch(r"(.*/)?python", word)]
        if places and words[places[-1] + 1:]:
            yield words[places[-1] + 1:]


class Stop(Exception):
    """Raised in place of parsing, with the parser."""


@functools.lru_cache(maxsize=None)
def parser(script):
    """The argument parser of a script, which its main() builds and calls first; None where it takes no arguments."""
    if not re.search(r"parse_args|def main", (ROOT / script).read_text(encoding="utf-8")):
        return None

    def stop(self, *_):
        raise Stop(self)

    spec = importlib.util.spec_from_file_location(f"page_{script[:-3].replace('/', '_')}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop) as stopped:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        module.main()
    found = stopped.value.args[0]
    found.allow_abbrev = False
    return found


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def links(page):
    """The relative links of a page, pictures included, as (path from the root or "" for the page itself, anchor)."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:href|src)="([^"]+)"', prose(page))
    for target in found:
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield os.path.normpath(os.path.join(os.path.dirname(page), path)) if path else page, anchor


@each_page
def test_links_lead_to_files_and_headings(page):
    for path, anchor in links(page):
        assert (ROOT / path).exists(), f"{page} links to {path}"
        assert not anchor or anchor in anchors(path), f"{page} links to {path}#{anchor}"
    assert len(set(anchors(page))) == len(anchors(page))


def test_the_readme_is_short_and_leads_to_every_page_and_the_pages_show_every_picture():
    assert len(PAGES["README.md"].splitlines()) <= 220
    assert set(PAGES) <= {path for path, _ in links("README.md")} | {"README.md"}
    shown = {path for page in PAGES for path, _ in links(page)}
    pictures = {f"docs/{p.name}" for p in (ROOT / "docs").iterdir() if p.suffix in (".png", ".jpg", ".gif")}
    assert pictures and pictures <= shown


@each_page
def test_commands_parse(page, capsys):
    for script, *arguments in python_calls(page):
        if script == "-m":
            module, arguments = arguments[0], [word for word in arguments[1:] if word.endswith(".py")]
            assert module in ("pytest", "venv") or (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
            assert all((ROOT / path).is_file() for path in arguments), arguments
        elif parser(script):
            try:
                parser(script).parse_args(arguments)
            except SystemExit:
                pytest.fail(f"{page}: python {script} {shlex.join(arguments)}: {capsys.readouterr().err}")
        else:
            assert not arguments, f"{page}: python {script} takes no arguments"


def test_commands_are_found_in_blocks_sentences_and_tables():
    calls = [call for page in PAGES for call in python_calls(page)]
    assert {"train.py", "synthesize.py", "extract.py", "evaluate.py", "network.py", "ray_tracer.py", "prepare.py",
            "make_scene.py", "convert.py", "report.py", "bench/bench.py",
            "docs/make_figures.py"} <= {call[0] for call in calls}
    assert len(calls) > 50


@each_page
def test_options_named_in_sentences_exist(page):
    ours = {option for call in {call[0] for other in PAGES for call in python_calls(other)} - {"-m"} if parser(call)
            for option in parser(call)._option_string_actions}
    for code in spans(page):
        script, *words = code.split()
        options = {word for word in (script, *words) if re.fullmatch(r"--[a-z-]+|-[A-Z]s?", word)}
        if options and re.fullmatch(r"[\w/]+\.py", script):
            assert options <= set(parser(script)._option_string_actions), code
        elif script.startswith("-"):
            assert options <= ours | OTHERS_OPTIONS, code


@each_page
def test_configurations_are_ours_or_are_said_to_be_the_users(page):
    for _, *arguments in python_calls(page):
        for option, path in zip(arguments, arguments[1:]):
            if option == "--config":
                folder, name = os.path.split(path)
                told = rf"`{re.escape(name)}` is\s+`config/\w+\.yaml`|to `{re.escape(name)}`"
                is_users = re.search(told, PAGES[page])
                is_copy = folder.startswith("results_") and (ROOT / "config" / name).is_file()
                assert (ROOT / path).is_file() or is_copy or is_users, f"{page}: {path}"


@each_page
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page):
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), f"{page}: {shlex.join(words)}"


@each_page
def test_files_named_exist(page):
    named = {word for code in spans(page) for word in code.split()}
    named |= {word for words in commands(page) for word in words}
    ours = {word for word in named if re.fullmatch(r"[\w./-]+\.(py|sh)|config/\w+\.yaml|requirements[\w-]*\.txt", word)}
    assert not [name for name in ours if not (ROOT / name).is_file()]


@each_page
def test_keys_named_exist(page):
    known = settings.flat(settings.load_config(ROOT / "config" / "default.yaml"))
    short = {name.split(".")[1] for name in known}
    for code in spans(page):
        dotted = re.match(r"((?:data|network|tracer|train|extract)\.(?!py\b)\w+)(: |$)", code)
        assert not dotted or dotted[1] in known, f"{page}: {code}"
        plain = re.match(r"([a-z_]+): \S", code)
        assert not plain or plain[1] in short, f"{page}: {code}"


@each_page
def test_snippets_of_configurations_are_valid(page, tmp_path):
    for number, snippet in enumerate(blocks(page, "yaml")):
        tree = yaml.safe_load((ROOT / "config" / "default.yaml").read_text())
        for section, keys in yaml.safe_load(snippet).items():
            tree[section].update(keys)
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(tree))
        settings.load_config(path)
