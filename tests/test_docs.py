"""The code that people copy from the README and the docs runs.

Per page, `python`, `console` and `bash` blocks run in order in one temporary folder and one Python namespace; of the
shell blocks the lines that begin with `panterra` run. A comment `<!-- not run: reason -->` above a block takes it out;
each of those is listed as a skipped test with its reason.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from panterra.cli import app, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = ("console", "bash")

FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page):
    text = page.read_text()
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            code=found["code"],
            reason=found["reason"],
        )
        for found in FENCE.finditer(text)
    ]


def commands(block):
    """Return the shell lines of a block as words, as a shell would: joined at backslashes, wildcards expanded."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line for line in lines if line.startswith("$ ")]
    written = [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").strip()]
    return [[name for word in shlex.split(line, comments=True) for name in expand(word)] for line in written]


def expand(word):
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [b for b in BLOCKS if b.reason is None and b.language in ("python", *SHELL)]


@pytest.mark.parametrize("page", sorted({b.page for b in RUN}), ids=lambda p: p.name)
def test_the_code_on_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__page__"}
    for block in (b for b in RUN if b.page == page):
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), names)
            continue
        for command in commands(block):
            assert command[0] == "panterra", f"{block}: only panterra runs here; put <!-- not run: reason --> above it"
            assert main(command[1:]) == 0, f"{block}: {shlex.join(command)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.reason], ids=str)
def test_blocks_that_do_not_run(block):
    """List what is not run, and check what can be checked without running it."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if block.language in SHELL:
        for command in commands(block):
            if command[0] == "make":
                assert command[1] in targets, f"{block}: the Makefile has no {command[1]}"
            if command[0] == "panterra":
                app.parse_args(command[1:], exit_on_error=False, print_error=False)
    if block.language == "python":
        compile(block.code, str(block), "exec")
    pytest.skip(f"{block} is not run: {block.reason}")


def test_every_block_says_its_language():
    assert not [str(b) for b in BLOCKS if not b.language]


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path = target.split("#")[0]
            if path and "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / path).exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r":\s*([\w-]+\.md)\s*$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    written = {p.name for p in (ROOT / "docs").glob("*.md")}
    assert written <= listed, f"not in mkdocs.yml: {sorted(written - listed)}"


def test_the_command_line_page_names_every_command_and_option():
    sections = re.split(r"^## `panterra (\w+)`$", (ROOT / "docs" / "cli.md").read_text(), flags=re.MULTILINE)
    documented = dict(zip(sections[1::2], sections[2::2], strict=True))
    assert list(documented) == [name for name in app if not name.startswith("-")]
    for name, text in documented.items():
        group = app[name]
        commands = [group] if group.default_command else [group[part] for part in group if not part.startswith("-")]
        options = {o for c in commands for argument in c.assemble_argument_collection() for o in argument.names}
        named = {o for o in options if o.startswith("--") and not o.startswith(("--no-", "--empty-"))}
        assert set(re.findall(r"`(--[\w-]+)`", text.rsplit("```", 1)[-1])) == named - {"--json"}, name


def test_the_models_page_lists_every_model():
    from panterra.models.weights import MODELS

    lines = (ROOT / "docs" / "models.md").read_text().splitlines()
    rows = [
        line
        for line in lines
        if line.startswith(tuple(f"| `{family}-" for family in ("panterra", "olmoearth", "anysat")))
    ]
    wanted = [f"| `{m.name}` | {m.parameters / 1e6:.1f} M | {m.dim} | {m.source} |" for m in MODELS.values()]
    assert rows == wanted
