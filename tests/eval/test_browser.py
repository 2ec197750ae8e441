"""A report in a real browser, on a phone's width: nothing is wider than the page, nothing is fetched.

RADIO_DISTILL_BROWSER=/usr/bin/chromium pytest tests/eval/test_browser.py
"""

import os
import re
import subprocess
from html import escape
from pathlib import Path

import pytest
import torch

from radio_distill import viz
from radio_distill.eval.report import write_report
from radio_distill.results import append
from radio_distill.types import Result

BROWSER = os.environ.get("RADIO_DISTILL_BROWSER", "")
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs a browser; set RADIO_DISTILL_BROWSER to the path of Chromium")

PHONE_PX = 390
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync")
MEASURE = """<pre id="found"></pre><script>onload = () => {
  const page = document.querySelector("iframe").contentDocument;
  found.textContent = "fetched " + page.defaultView.performance.getEntriesByType("resource").filter(x => !x.name.startsWith("data:")).length
    + " over " + (page.documentElement.scrollWidth - page.documentElement.clientWidth) + " tables " + page.querySelectorAll("table").length; }</script>"""


def result(
    task: str, value: float, side: int = 512, model: str = "runs/a_run_with_quite_a_long_name/stage3@500", **facts: object
) -> Result:
    known: dict[str, object] = {"suite": "dense", "unit": "percent", "higher_is_better": True, "dataset": "ade20k/validation#1"}
    return Result(task=task, metric="score", value=value, model=model, count=9, resolution=side, **{**known, **facts})  # type: ignore[arg-type]


@pytest.mark.timeout(120)
def test_nothing_is_wider_than_a_phone(tmp_path: Path) -> None:
    names = [f"a_task_with_a_long_name_{i}" for i in range(6)]
    append(tmp_path / "results.jsonl", [result(name, 50.0) for name in names])
    append(
        tmp_path / "results.jsonl", [result("ade20k", 50.0, model=model, preset="paper") for model in ("baseline", "x" * 90)]
    )
    append(tmp_path / "results.jsonl", [result("curve", side / 9, side, headline=False) for side in (128, 256, 2048)])
    viz.save_png(torch.rand(3, 99, 2000), tmp_path / "eval_pictures" / "dense" / f"{'long' * 30}.png")
    report = write_report(tmp_path).read_text()
    page = tmp_path / "frame.html"
    page.write_text(f'<iframe style="width:{PHONE_PX}px;height:844px;border:0" srcdoc="{escape(report)}"></iframe>{MEASURE}')
    shown = subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        check=True, capture_output=True, text=True, timeout=100,
    ).stdout  # fmt: skip
    fetched, over, tables = map(int, re.findall(r"(?:fetched|over|tables) (\d+)", shown.rpartition('id="found"')[2]))
    assert (fetched, over) == (0, 0)
    assert tables >= 1
    assert "<script" not in report
