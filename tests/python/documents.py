# SPDX-License-Identifier: Apache-2.0
"""Reads the Markdown documents: their code blocks, links, headings and the words in code type."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(```+)(\w*)\n(.*?)^\1\n", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of code, and the line of the document that it begins on."""

    language: str
    code: str
    line: int
    comment: str  # the text of the HTML comment on the line before, if any


@dataclass(frozen=True)
class Document:
    """A Markdown file of the repository."""

    path: Path

    @property
    def text(self) -> str:
        return self.path.read_text()

    @property
    def prose(self) -> str:
        """The text without blocks of code."""
        return FENCE.sub("", self.text)

    def blocks(self, *languages: str) -> list[Block]:
        """Return the blocks in some languages, in order."""
        text, found = self.text, []
        for match in FENCE.finditer(text):
            before = text[: match.start()]
            comment = re.search(r"<!-- (.*) -->\n\Z", before)
            line = before.count("\n") + 2
            found.append(Block(match[2], match[3], line, comment[1] if comment else ""))
        return [block for block in found if block.language in languages]

    def links(self) -> list[str]:
        """Return the targets of links and images."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    def code_words(self) -> list[str]:
        """Return what stands in code type within the prose."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    def commands(self) -> list[str]:
        """Return the lines of shell blocks and the words in code type, without comments."""
        lines = [line for block in self.blocks("sh", "") for line in block.code.splitlines()]
        return [re.sub(r"\s+#.*", "", line) for line in [*lines, *self.code_words()]]

    def anchors(self) -> set[str]:
        """Return the names that GitHub gives to the headings."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def run(self, block: Block, names: dict[str, object]) -> None:
        """Execute a block of Python; errors point into the document."""
        padding = "\n" * (block.line - 1)
        exec(compile(padding + block.code, str(self.path), "exec"), names)


def documents() -> list[Document]:
    """Return every document, but not what a program wrote."""
    patterns = ["*.md", "docs/**/*.md", "benchmarks/*.md", "benchmarks/peers/*.md", "benchmarks/results/README.md"]
    return [Document(path) for pattern in patterns for path in sorted(ROOT.glob(pattern))]
