"""The page in a real browser: drawn, quiet, readable on a desk and in a hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from var_moe.report.page import build_report, write_report

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from screenshots import browser, browser_path, opened

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        browser_path() is None or importlib.util.find_spec("playwright") is None,
        reason="needs Chromium (`apt install chromium`) and playwright",
    ),
]


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


def folders(six_thresholds, with_profile, alone):
    assert six_thresholds == with_profile  # one sample: six thresholds and a profile
    singles = ("evaluation", "comparison", "stability", "routing_analysis")
    analysis = alone("systems_analysis", "profile_report")
    return [with_profile, analysis, *(alone(name) for name in singles)]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1440, 400])
def test_every_report_is_drawn(chromium, six_thresholds, with_profile, alone, width, dark):
    for folder in folders(six_thresholds, with_profile, alone):
        page = write_report(folder)
        wanted = len(build_report(folder).pictures)
        with opened(chromium, page, width=width, dark=dark) as tab:
            assert tab.problems == []
            plots = tab.locator("[data-figure] .main-svg")
            drawn = tab.evaluate(
                "[...document.querySelectorAll('[data-figure]')].filter(node => "
                "node.querySelector('.trace, .bars, .hm, .scatterlayer path')).length"
            )
            assert drawn == wanted, folder
            assert plots.count() >= wanted
            # Nothing sticks out of the page; wide tables and plots scroll inside their own box.
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            small = tab.evaluate(
                "[...document.querySelectorAll('p, td, th, dd, li')]"
                ".filter(node => parseFloat(getComputedStyle(node).fontSize) < 12).length"
            )
            assert small == 0


def contrast(one, other):
    def light(colour):
        parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        parts = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out(chromium, with_profile, dark):
    with opened(chromium, write_report(with_profile), width=1440, dark=dark) as tab:
        pairs = tab.evaluate(
            """[...document.querySelectorAll('h1, .question, .caption, td, .xtick text')].map(n => {
                 let up = n;
                 while (up && ['rgba(0, 0, 0, 0)', 'transparent']
                          .includes(getComputedStyle(up).backgroundColor)) up = up.parentElement;
                 const style = getComputedStyle(n);
                 return [n instanceof SVGElement ? style.fill : style.color,
                         getComputedStyle(up).backgroundColor];
               })"""
        )
        assert len(pairs) > 20
        assert min(contrast(*pair) for pair in pairs) >= 4.5  # WCAG AA


def test_colours_follow_the_reader(chromium, sample):
    with opened(chromium, write_report(sample), width=1440) as tab:
        read = "getComputedStyle(document.querySelector('.xtick text')).fill"
        before = tab.evaluate(read)
        tab.emulate_media(color_scheme="dark")
        tab.wait_for_function(f"{read} !== '{before}'")


def test_a_figure_is_saved_for_a_paper(chromium, sample, tmp_path):
    with opened(chromium, write_report(sample), width=1440) as tab:
        tab.locator('[data-figure="best-so-far"]').hover()
        with tab.expect_download() as got:
            tab.locator('[data-figure="best-so-far"] [data-title="Save as SVG"]').click()
        got.value.save_as(tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert text.startswith("<svg")
    assert "unmodified model" in text


def test_a_report_prints(chromium, sample, tmp_path):
    with opened(chromium, write_report(sample), width=1440, dark=True) as tab:
        tab.pdf(path=tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
