"""The API reference can be made, has every module, and docs/api.md is what it makes now."""

from __future__ import annotations

import pytest

import ms_pangu_quant
from tests.conftest import ROOT
from tools.dev import api


def test_the_committed_page_is_current():
    assert api.markdown() == (ROOT / "docs/api.md").read_text(encoding="utf-8"), "run `make api`"


def test_the_committed_page_has_every_public_name():
    page = api.markdown()
    for name in ms_pangu_quant.__all__:
        assert f"### {name}\n" in page or f"`{name}`" in page


@pytest.mark.slow
def test_every_module_gets_a_page_with_its_docstrings_as_they_are_written(tmp_path):
    api.write_html(tmp_path)
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "ms_pangu_quant").rglob("*.py")
        if path.name != "__main__.py" and "guest" not in path.parts
    }
    pages = {".".join(path.relative_to(tmp_path).with_suffix("").parts): path for path in tmp_path.rglob("*.html")}
    assert modules <= set(pages)
    assert not any("guest" in name for name in pages)
    text = pages["ms_pangu_quant.transforms.smooth"].read_text(encoding="utf-8")
    assert "\nabsmax_w  [in], max |w| over the outputs of every layer that reads x.\n" in text
