"""docs/config.md does what it says: its YAML files load, its Python runs, its commands print what stands below them."""

import re
import shlex

from radio_distill.cli import main


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_block_of_the_config_page_holds(repo, tmp_path, monkeypatch, capsys):
    page = (repo / "docs" / "config.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, text in blocks(page):
        if kind == "yaml":
            (tmp_path / text.split()[1]).write_text(text)
        elif kind == "python":
            exec(text, names)
        else:
            command, _, expected = text.partition("\n")
            main(shlex.split(command)[2:])
            assert capsys.readouterr().err.replace(f"{repo}/", "") == expected
