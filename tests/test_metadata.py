"""The version and the paper are the same in every file that names them."""

import re
from pathlib import Path

import yaml

import lgvq_plugin

ROOT = Path(__file__).parents[1]


def test_the_version_is_the_same_everywhere():
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## \[(\d[^]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert lgvq_plugin.__version__ == citation["version"] == version
    assert released[0] == (version, citation["date-released"])


def test_the_paper_is_cited():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert paper["title"] == "LG-VQ: Language-Guided Codebook Learning"
    assert len(paper["authors"]) == 9
    assert paper["url"] in (ROOT / "README.md").read_text()
    assert paper["url"] in (ROOT / "pyproject.toml").read_text()
