"""The pages say what the code says: nothing that is made is stale, and what is named exists."""

import re
import runpy
from typing import get_args, get_origin

import pytest

from docs import glossary
from sslr1 import config, model, puzzles
from sslr1.config.inputs import Task
from sslr1.config.kinds import Section
from sslr1.setup import budget, card
from tests.conftest import ROOT
from tests.model.test_load import published

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SOURCE = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "sslr1").rglob("*.py")))


@pytest.fixture(scope="module")
def make():
    """The generator's functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))  # as for a script
        return runpy.run_path(str(DOCS / "make.py"))


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


def anchors(text):
    """What a link may point at: headings as GitHub names them, and explicit anchors."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="(.+?)">', text))


def keys(section=config.Config, path=""):
    """Every key of the configuration, and its sections."""
    for name, field in section.model_fields.items():
        yield f"{path}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{path}{name}.")
        elif get_origin(field.annotation) is dict and get_args(field.annotation)[1] is Task:
            yield from keys(Task, f"{path}{name}.NAME.")


def test_pages_are_fresh(make):
    stale = make["stale"]()
    assert not stale, f"run `make docs`: {', '.join(path.name for path in stale)}"


def test_what_is_made_is_in_the_pages(make):
    """Every block is on one page, every puzzle has its own, and a change by hand would be found."""
    begun = [
        name for page in PAGES for name in re.findall(r"<!-- begin: (.+?) -->\n.*?\n<!-- end -->", read(page), re.S)
    ]
    assert sorted(begun) == sorted(make["BLOCKS"])
    assert {name for name in puzzles.NAMES if f"\n## {name}\n" in read("puzzles.md")} == set(puzzles.NAMES)
    text = read("configuration.md")
    assert make["fill"](text.replace("| `1e-06` |", "| `1` |")) == text and "| `1e-06` |" in text


def test_every_setting_is_on_the_page():
    told = re.findall(r'^\| <a id="(.+?)"></a>`(.+?)` \|', read("configuration.md"), re.M)
    sections = {key for key in keys() if any(other.startswith(f"{key}.") for other in keys())}
    assert [a for a, _ in told] == [b for _, b in told] and len(told) == len(set(told))
    assert {key for key, _ in told} == set(keys()) - sections


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = read(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (DOCS / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_configurations_that_are_named_exist():
    named = {name for page in (ROOT / "README.md", *PAGES) for name in re.findall(r"configs/[\w.-]+\.yaml", read(page))}
    assert len(named) > 4 and all((ROOT / name).is_file() for name in named), named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_and_metrics_that_are_named_exist(page):
    known, sections = set(keys()), list(config.Config.model_fields)
    for word in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)):
        setting = re.match(rf"({'|'.join(sections)})(\.[a-z_]+)+(?=$|[=, ])", word)
        if setting and not word.endswith((".py", ".safetensors", ".json")):
            assert setting[0] in known, word
        metric = word.replace("<puzzle>", "rotation").replace("<k>", "2")
        if re.fullmatch(
            r"(reward|accuracy|exact|curriculum|completions|sampling|timing_s|perf|eval|clip_ratio|ratio)s?/[\w/]+",
            metric,
        ):
            assert glossary.find(metric), word


def test_errors_that_are_quoted_exist():
    joined = re.sub(r'"\s*\n\s*f?"', "", SOURCE)
    quotes = re.findall(r'\*"(.+?)"', read("troubleshooting.md"))
    assert len(quotes) >= 4
    for quote in quotes:
        longest = max(re.split(r"[…(\d]", quote), key=len).strip()
        assert len(longest) > 12 and longest in joined, longest


def test_every_line_of_the_plan_can_be_lowered(tiny):
    """docs/troubleshooting.md says how, for each line that the planner prints."""
    told = {
        what.strip()
        for row in re.findall(r"^\| ([^|]+) \|", read("troubleshooting.md"), re.M)
        for what in row.split(",")
    }
    memory, _ = budget.plan(config.load(ROOT / "configs" / "tiny.yaml"), tiny, 1)
    assert {line.what for line in memory} <= told


def test_the_plan_that_is_shown_is_the_planners(tmp_path, tiny):
    folder, _ = published(tmp_path / "model", tiny, "qwen2.5-vl-3b")
    shown = budget.report(config.load(ROOT / "configs" / "qwen2.5-vl-3b-one-gpu.yaml"), folder, 1).rstrip()
    assert f"```text\n{shown}\n```" in read("troubleshooting.md"), f"docs/troubleshooting.md should show\n{shown}"
    shown = card.report(config.check({"model": {"path": "m"}}, data=False), "qwen2.5-vl-3b", 1, "h100")
    assert f"```text\n{shown}\n```" in read("troubleshooting.md"), f"docs/troubleshooting.md should show\n{shown}"
    assert all(f"`{name}`" in read("troubleshooting.md") for name in (*model.SIZES, *card.NAMES))


def test_the_glossarys_sources_exist():
    for entries in glossary.GLOSSARY.values():
        for name, metric in entries.items():
            module, _, function = metric.source.partition(".")
            found = [
                path
                for path in (ROOT / "sslr1").rglob("*.py")
                if module in path.relative_to(ROOT / "sslr1").with_suffix("").parts
            ]
            last = metric.source.split(".")[-1]
            assert any(re.search(rf"(def|class) {last}\b", path.read_text()) or path.stem == last for path in found), (
                name
            )
