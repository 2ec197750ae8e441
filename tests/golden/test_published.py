"""The shipped tables of the paper against an independent transcription of them."""

import json
import re

import pytest
from conftest import golden_cases

from radio_distill.eval.published import load_tables, students, tasks

CASES = golden_cases("metrics/published_tables*.json")


def slug(head):
    return re.sub(r"\W+", "_", head).lower()


def flat(rows):
    """Rows in any of the transcription's three forms as one list of numbers for each."""
    if isinstance(rows, list):
        return [row["values"] for row in rows]
    return [
        x["values"] if isinstance(x, dict) else x for row in rows.values() for x in (row if isinstance(row[0], dict) else [row])
    ]


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_every_number_is_the_papers(path):
    published = {k.removeprefix("table"): v for k, v in json.loads(path.read_text())["tables"].items() if k.startswith("table")}
    assert set(load_tables()) == set(published)
    for number, theirs in published.items():
        assert [list(row) for row in load_tables()[number].rows.values()] == flat(theirs["rows"]), number


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_columns_have_the_papers_units_directions_and_groups(path):
    published = json.loads(path.read_text())["tables"]
    for number, ours in load_tables().items():
        theirs = published[f"table{number}"]["columns"]
        assert [slug(name) for name in ours.columns] == [slug(c["name"]) for c in theirs]
        facts = [(c.unit, c.higher_is_better, c.group) for c in ours.columns.values()]
        assert facts == [(c["unit"], c["higher_is_better"], c.get("group")) for c in theirs]
        assert set(ours.ours.values()) <= set(ours.rows)


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_rows_name_what_was_measured(path):
    published = json.loads(path.read_text())["tables"]
    for number in ("12", "13", "14"):
        for name, theirs in zip(load_tables()[number].rows, published[f"table{number}"]["rows"], strict=True):
            added = f" + {theirs['upsampler']}" if theirs["upsampler"] else ""
            assert name == f"{theirs['encoder']} {theirs['input_px']} px{added}"
    for encoder, rows in published["table1"]["rows"].items():
        for row in rows:
            name = encoder if row["factor"] == 1 else f"{encoder} + {row['upsampler']} {row['factor']}x"
            assert load_tables()["1"].rows[name] == tuple(row["values"])


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_misprints_are_marked_and_the_printed_number_kept(path):
    published = json.loads(path.read_text())["tables"]
    for number, ours in load_tables().items():
        theirs = published[f"table{number}"].get("suspect", [])
        assert [(m.row, m.column, m.implied) for m in ours.misprints] == [
            (s["row"], s["column"], s["implied_by_table2"]) for s in theirs
        ]
        for s in theirs:
            assert students()[s["row"]][s["column"]] == s["printed"]
            assert students()[f"{s['row']} corrected"][s["column"]] == s["implied_by_table2"]


def test_thirty_one_tasks_in_seven_groups():
    assert len(tasks()) == 31
    assert len({c.group for c in tasks().values()}) == 7
