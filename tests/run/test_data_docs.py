"""The commands of docs/data.md run, one after the other, with trainings of one step."""

import re
import shlex

from docs_blocks import blocks

from radio_distill.cli import main

ONE_STEP = ["optim.steps=1", "balance.window=1", "partitions.low.images=32", "data.streams=2", "log.pictures=0"]


def test_the_commands_of_the_data_page_run(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, block in blocks((repo / "docs/data.md").read_text()):
        if named := re.match(r"# ([\w/]+\.yaml)\n", block):
            (tmp_path / named[1]).write_text(block)
        for line in block.splitlines() if kind == "bash" else ():
            words = shlex.split(line, comments=True)[1:]
            short = ONE_STEP if words[0] in ("train", "cache") else []
            assert main([*words, *short]) == 0, line
