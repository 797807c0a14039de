"""The report is one file that needs nothing beside it, says what was measured, and stays small."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from triune.errors import UserError
from triune.eval import rates_table, report, write_report
from triune.eval.charts import curve

from .test_suite import place, run

__all__ = ["place"]

LIMIT = 10_000_000
FILMED = ["videos.first=2", "videos.failures=1"]


def test_the_report_holds_everything_in_one_file(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = run(place, episodes=5, overrides=FILMED)
    run(place, "expert", policy="expert", episodes=5)
    path = write_report(
        place / "out",
        graph_svg="<svg id='the-graph'></svg>",
        provenance={"VLM training": "31 minutes"},
        beside={"scripted expert": place / "expert"},
    )
    page = path.read_text()
    assert path.stat().st_size < LIMIT
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "http" not in page.replace("http-equiv", "")
    assert page.count('src="data:video/mp4;base64,') >= 5
    assert page.count('src="data:image/png;base64,') >= 4
    for text in (
        "Two squares",
        "the-graph",
        "31 minutes",
        "scripted expert",
        "loss_foresight",
        "instruction swapped",
        "reach the red square",
    ):
        assert text in page
    assert f"{results['overall']['successes']} of 10 held-out episodes succeeded" in page
    assert page.index("<h2>Failures</h2>") < page.index("<h2>Successes</h2>")
    films = page.count("data:video/mp4")
    sizes = [video.stat().st_size for video in (place / "out" / "videos").iterdir()]  # of films and their stills
    monkeypatch.setattr(report, "VIDEO_BYTES", 4 * max(sizes))
    short = write_report(place / "out").read_text()
    assert 1 <= short.count("data:video/mp4") < films
    assert "are shown" in short or "is shown" in short  # what room there is goes to failures


def test_a_report_of_experts_leaves_out_what_there_is_not(place: Path) -> None:
    run(place, policy="expert", episodes=2)
    page = write_report(place / "out").read_text()
    assert "No episode failed." in page
    for absent in ("<h2>Controls</h2>", "<h2>Training</h2>", "<h2>Foresight</h2>", "<h2>The model</h2>", "<h2>Beside"):
        assert absent not in page


def test_words_of_users_are_escaped(place: Path) -> None:
    suite = place / "suite.yaml"
    suite.write_text(suite.read_text().replace("Two squares", "<script>alert(1)</script>"))
    run(place, episodes=1)
    assert "<script>" not in write_report(place / "out").read_text()


def test_the_terminal_table_names_rates_and_bars(place: Path) -> None:
    console = Console(width=140)
    with console.capture() as capture:
        console.print(rates_table(run(place)))
    text = capture.get()
    assert "16/20" in text and ">= 0.7 met" in text and "control: instruction swapped" in text and "not scored" in text


def test_no_evaluation_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*results.json; finish the evaluation first"):
        write_report(tmp_path)


def test_curves_of_any_range() -> None:
    for values in ([1.0, 1.0, 1.0], [5.0, 0.3, 0.001], [0.0, -2.0, 3.0], [float("nan"), 2.0, 1.9]):
        svg = str(curve([0, 10, 20], values))
        assert svg.startswith("<svg") and "nan" not in svg
    assert str(curve(range(5000), [1.0 + i % 7 for i in range(5000)])).count(",") < 1500
