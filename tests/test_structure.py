"""The documents name and link what is there, and nothing that is not; README stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("telemetry", "policies", "replicas", "router", "cluster", "loadtest", "training", "tests")
MAX_README_LINES = 150

DOCS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))
EXPERIMENTS = [name for name in DOCS if name.startswith("docs/experiments/")]
PAGES = ["README.md", "STRUCTURE.md", *DOCS]


def prose(document: str) -> str:
    """The text without blocks of code, where a path may be an example and a bracket a program's."""
    return re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)


def named_paths(text: str) -> set[str]:
    """What the text names as a file or folder of this repository."""
    pattern = rf"(?<![\w/.])((?:{'|'.join(PACKAGES)}|docs|benchmarks|helm)/[\w./-]*)"
    return {match.rstrip(".") for match in re.findall(pattern, text)}


def links(document: str) -> list[tuple[Path, str]]:
    """Links within the repository: the file, and the heading's anchor or ''."""
    found = re.findall(r"\]\(([^()\s]+)\)", prose(document))
    local = [target for target in found if "://" not in target]
    parted = [target.partition("#") for target in local]
    home = ROOT / document
    return [((home.parent / path).resolve() if path else home, anchor) for path, _, anchor in parted]


def anchors(path: Path, mark: str = "#+") -> set[str]:
    """The anchors, as GitHub makes them, of the headings that begin with `mark`."""
    headings = re.findall(rf"^{mark} (.+)$", prose(str(path.relative_to(ROOT))), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def missing_links(document: str) -> list[str]:
    return [
        f"{path.name}#{anchor}"
        for path, anchor in links(document)
        if not path.exists() or (anchor and anchor not in anchors(path))
    ]


@pytest.mark.parametrize("document", ["STRUCTURE.md", "README.md", *EXPERIMENTS])
def test_named_files_exist(document: str) -> None:
    named = named_paths((ROOT / document).read_text())
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing, f"{document} names what does not exist: {missing}"


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_to_a_file_and_a_heading(document: str) -> None:
    assert missing_links(document) == []


def test_structure_and_readme_name_files() -> None:
    assert len(named_paths((ROOT / "STRUCTURE.md").read_text())) > 50
    assert len(named_paths((ROOT / "README.md").read_text())) > 5


def test_every_page_is_reached_from_readme() -> None:
    reached: set[Path] = set()
    pages = [ROOT / "README.md"]
    while pages:
        page = pages.pop()
        if page not in reached:
            reached.add(page)
            targets = [path for path, _ in links(str(page.relative_to(ROOT)))]
            pages += [path for path in targets if path.suffix == ".md" and path.is_file()]
    assert [name for name in PAGES if ROOT / name not in reached] == []


def test_readme_is_short() -> None:
    num_lines = len((ROOT / "README.md").read_text().splitlines())
    assert num_lines <= MAX_README_LINES, f"README.md has {num_lines} lines; figures go to docs/numbers.md"


@pytest.mark.parametrize("document", [name for name in EXPERIMENTS if not name.endswith("README.md")])
def test_every_experiment_is_dated_and_in_the_index(document: str) -> None:
    path = ROOT / document
    first_lines = re.findall(r"^### .+\n\n(.*)$", path.read_text(), flags=re.MULTILINE)
    assert first_lines
    assert [line for line in first_lines if not re.match(r"\*20\d\d-\d\d-\d\d.*Machine: ", line)] == []
    indexed = {anchor for target, anchor in links("docs/experiments/README.md") if target == path}
    assert anchors(path, "###") - indexed == set()


def test_every_package_is_named() -> None:
    text = (ROOT / "STRUCTURE.md").read_text()
    subpackages = {path.parent.relative_to(ROOT) for path in ROOT.glob("*/**/__init__.py")}
    ours = sorted(str(path) for path in subpackages if path.parts[0] in PACKAGES[:-1])
    assert [name for name in ours if f"{name}/" not in text] == []


def test_init_files_are_empty() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("__init__.py"):
            assert not path.read_text(), f"{path} is not empty"


def test_files_are_short() -> None:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if "node_modules" in path.parts:
                continue
            num_lines = len(path.read_text().splitlines())
            assert num_lines <= 420, f"{path.relative_to(ROOT)} has {num_lines} lines; split it"
