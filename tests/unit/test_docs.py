"""What the documents say is there: files, links and verbs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minigpt.cli.verbs import COMMANDS, TRAINER_VERBS
from minigpt.datatools.fetch import CORPORA

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")])


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda f: str(f.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            path, _, part = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), link
            headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M) if part else []
            assert not part or part in map(slug, headings), link


def tree() -> list[str]:
    """Return the paths of the tree in docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = page.partition("## The tree\n\n```\n")[2]
    above: list[str] = []
    paths = []
    for line in drawn.partition("```")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [line.split()[0]]
        paths.append("".join(above))
    return paths


def test_the_tree_is_the_repositorys() -> None:
    paths = tree()
    assert [path for path in paths if not (ROOT / path).exists()] == []
    parts = {f.relative_to(ROOT).parts[:2] for f in (ROOT / "minigpt").rglob("*.py")}
    parts = {("/".join(part), f"{'/'.join(part)}/") for part in parts}
    assert [part for part in parts if not set(part) & set(paths)] == [
        ("minigpt/__init__.py", "minigpt/__init__.py/")
    ]


def test_both_readmes_show_every_verb_and_guide() -> None:
    for name in ("README.md", "README.zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        verbs = set(re.findall(r"minigpt +([a-z]+) ", text))
        assert {*TRAINER_VERBS, *COMMANDS} - verbs <= {"validate"}
        files = set(re.findall(r"\bconfigs/[\w/]+\.yaml\b", text))
        assert [file for file in sorted(files) if not (ROOT / file).is_file()] == []
        recipes = {f"configs/recipes/{file.name}" for file in (ROOT / "configs/recipes").iterdir()}
        assert recipes <= files
        fetched = set(re.findall(r"minigpt data fetch ([\w-]+)", text))
        assert fetched <= set(CORPORA)
        guides = {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")} - {"docs/log.md"}
        assert [guide for guide in sorted(guides) if guide not in text] == []


def test_the_chinese_readme_marks_what_is_only_in_english() -> None:
    text = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    links = re.finditer(r"\]\(([\w./-]+\.md)(#[^)]*)?\)(.{0,3})", text)
    unmarked = [m[1] for m in links if m[2] != "#中文" and "英文" not in m[3]]
    assert unmarked == ["README.md"]
