"""The code in the project's documents."""

import re
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

DOCUMENTS = sorted(
    path
    for pattern in ["*.md", "docs/**/*.md", "[!.]*/README.md", "crates/*/README.md", "tests/data/**/*.md"]
    for path in ROOT.glob(pattern)
    if "target" not in path.parts[len(ROOT.parts) :]
)


@dataclass
class Block:
    file: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks(file: Path) -> list[Block]:
    """Fenced blocks with the language they name, and indented ones, which are shell commands."""
    found, block, fence, before = [], None, "", ""
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if fence:
            if line.strip() == fence:
                fence, block = "", None
            else:
                block.text += line + "\n"
        elif opening := re.fullmatch(r" *(`{3,}|~{3,})(.*)", line):
            fence, language = opening.groups()
            block = Block(file, number, language.strip() or "none", "")
            found.append(block)
        elif line.startswith("    ") and (block or not before.strip()):
            if not block:
                block = Block(file, number, "shell", "")
                found.append(block)
            block.text += line[4:] + "\n"
        elif line.strip():
            block = None
        before = line
    assert not fence, f"{file}: a code block is not closed"
    return found


def prose(file: Path) -> list[tuple[int, str]]:
    """Lines outside tables, with their number. Code counts, for want of a place where a long line of it can be read."""
    return [(number, line) for number, line in enumerate(file.read_text().splitlines(), 1) if not line.startswith("|")]


def spans(file: Path) -> list[tuple[int, str]]:
    """Code in the prose, with its line."""
    inside = {number for block in blocks(file) for number in range(block.line, block.line + block.text.count("\n") + 1)}
    lines = [(number, line) for number, line in enumerate(file.read_text().splitlines(), 1) if number not in inside]
    return [(number, span) for number, line in lines for span in re.findall(r"`([^`]+)`", line)]


def links(file: Path) -> list[tuple[int, str]]:
    """Links to files of the project."""
    lines = enumerate(file.read_text().splitlines(), 1)
    found = [(number, target) for number, line in lines for target in re.findall(r"\]\(([^)\s]+)\)", line)]
    return [(number, target) for number, target in found if not re.match(r"[a-z]+:", target)]


def anchors(file: Path) -> set[str]:
    """What a heading is linked to as."""
    headings = re.findall(r"^#+ +(.*)$", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
