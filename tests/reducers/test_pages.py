"""The lines of the reducers' pages run, with small random models in place of the reader's own."""

import re
from pathlib import Path

import pytest
import torch
import transformers

import vistok
from tests.test_applied import llava, prompts

PAGES = Path(__file__).resolve().parents[2] / "docs" / "systems"


def small_vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=40, patch_size=8
    )
    return transformers.ViTForImageClassification(config).eval()


@pytest.mark.parametrize("slug", ["tome", "divprune"])
@torch.no_grad()
def test_the_lines_run(slug, monkeypatch, capsys):
    create = vistok.create
    monkeypatch.setattr(vistok, "create", lambda name: create({"tome-deit-small": "tome-tiny"}.get(name, name)))
    code = "\n".join(re.findall(r"```python\n(.*?)```", (PAGES / f"{slug}.md").read_text(), re.DOTALL))
    names: dict = {
        "vit": small_vit(),
        "images": torch.rand(2, 3, 40, 40),
        "features": torch.rand(2, 26 - 12, 8),
        "pictures": torch.rand(2, 3, 32, 32),
        "tokens": torch.rand(2, 30, 8),
        "llava": llava(),
        "inputs": prompts(),
    }
    exec(compile(code, slug, "exec"), names)
    assert names["dense"].shape == (2, 30, 8)
    assert "before" in capsys.readouterr().out
    if slug == "tome":
        assert names["left"][-1] == 197 - 12 * 8
        assert names["run"].counts == [58, 52, 46, 40]
    else:
        assert names["answer"].shape == (2, 35)
        assert names["kept"].shape[1] == names["order"].shape[1] == 3
