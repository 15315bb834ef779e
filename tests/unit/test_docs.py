"""The documentation: commands are accounted for, links lead somewhere, generated parts are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from checkout import ROOT, load_script, see_experiments
from pages import PAGES, commands

IDS = [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_are_run_or_say_why_not(page: Path) -> None:
    for block in commands(page):
        said = f"above this block of {page.name}:\n{block.code}"
        assert block.mark is not None, f"Write <!-- run --> (or 'run by: TEST', 'not run: REASON') {said}"
        kind, _, rest = block.mark.partition(": ")
        assert kind in ("run", "run by", "not run"), f"'{block.mark}' {said}"
        if kind == "run by":
            assert (ROOT / rest).is_file(), f"There is no test '{rest}', named {said}"
        if kind == "not run":
            assert len(rest) > 10, f"No reason {said}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_pictures_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{page.name} links to '{target}'"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in {slug(title) for title in titles}, f"{page.name} links to '{target}'"


def slug(title: str) -> str:
    kept = re.sub(r"[^\w\s-]", "", title.lower()).strip()
    return re.sub(r"[\s]+", "-", kept)


def test_every_page_is_in_the_menu() -> None:
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = re.findall(r"[\w-]+\.md", str(menu))
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_configuration_reference_is_that_of_the_code() -> None:
    script = load_script(ROOT / "docs" / "generate_configuration.py")
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), (
        "run `python docs/generate_configuration.py`"
    )


def test_every_setting_is_described() -> None:
    script = load_script(ROOT / "docs" / "generate_configuration.py")
    described = script.attributes(script.NoiseLoss)
    assert described["coefficient"] == "λ_N." and "linear" in described["decay"]
    assert {"std_low", "std_high"} <= script.attributes(script.Corruption).keys()


def test_results_are_those_of_the_experiments() -> None:
    see_experiments()
    from experiments.tables import PAGES as QUOTING
    from experiments.tables import filled

    for page in QUOTING:
        text = page.read_text(encoding="utf-8")
        assert "<!-- results" in text
        assert text == filled(text), "run `python -m experiments.tables`"


def test_figures_say_nothing_by_colour_alone() -> None:
    see_experiments()
    from experiments.denoising.figures import STYLES as DENOISING
    from experiments.generated.figures import STYLES as GENERATED
    from experiments.md17.figures import STYLES as MD17
    from experiments.oc20.figures import STYLES as OC20

    for styles in (DENOISING, GENERATED, MD17, OC20):
        for how in ("color", "marker", "dash"):
            assert len({str(getattr(style, how)) for style in styles.values()}) == len(styles), how
