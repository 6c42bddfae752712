"""The prose is true: CONTRIBUTING's system runs, and links and commands in the docs exist."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vistok
from vistok.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_the_system_in_contributing_is_whole():
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert code
    exec(compile(code.group(1), "CONTRIBUTING.md", "exec"), {"__name__": "sketch"})
    torch.manual_seed(0)
    tok = vistok.create("sketch-tiny").train()
    pixels = torch.rand(2, 3, 64, 64)
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(tok.parameters(), 3e-3)
    losses = []
    for step in range(40):
        loss = sum(tok.loss({"pixels": pixels}, step, rng).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert tok.decode(tok.encode(pixels[..., :50, :30])).shape == (2, 3, 50, 30)


@pytest.mark.parametrize("page", ["README.md", "docs/systems/strata.md"])
def test_the_first_lines_of_python_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.RandomState(0)
    Image.fromarray(rng.randint(0, 256, (70, 90, 3), dtype=np.uint8)).save("photo.jpg")
    code = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert code
    names: dict = {}
    exec(compile(code.group(1), page, "exec"), names)
    assert names["pixels"].shape == (1, 3, 70, 90)
    assert names["rough"].shape == names["pixels"].shape


# Published weights are not here: a system's page runs with the small model that stands for the large one.
STANDS_FOR = {
    "fqgan": {"fqgan-dual-ds16": "fqgan-tiny", "fqgan-far-dual-b": "fqgan-far-tiny"},
    "tokenbridge": {
        "tokenbridge-kl16": "tokenbridge-tiny",
        "tokenbridge-generator-large": "tokenbridge-generator-tiny",
    },
    "llamagen": {"vqgan-llamagen-f16": "vqgan-llamagen-tiny", "llamagen-b": "llamagen-tiny"},
    "flextok": {"flextok-d18-d28": "flextok-tiny"},
    "karl": {"karl-small": "karl-tiny"},
    "robusttok": {"robusttok-4096": "robusttok-tiny", "robusttok-rar-b": "robusttok-rar-tiny"},
    "binary-latent-diffusion": {
        "binary-latent-diffusion-c64": "binary-latent-diffusion-tiny",
        "binary-latent-diffusion-generator-c64": "binary-latent-diffusion-generator-tiny-free",
    },
    "var": {"var-vae": "var-tiny", "var-d16": "var-generator-tiny"},
    "maskgit": {"maskbit-tokenizer-14bit": "maskbit-tokenizer-tiny", "maskbit-14bit": "maskbit-tiny"},
}


@pytest.mark.parametrize("slug", STANDS_FOR)
def test_the_lines_of_a_systems_page_run(slug, monkeypatch):
    torch.manual_seed(0)
    create = vistok.create
    monkeypatch.setattr(vistok, "load", lambda name: create(STANDS_FOR[slug][name]))
    monkeypatch.setattr(vistok, "create", lambda name: create(STANDS_FOR[slug][name]))
    text = (ROOT / "docs" / "systems" / f"{slug}.md").read_text()
    for name in STANDS_FOR[slug]:
        assert name in vistok.list_models("*")
        assert f'"{name}"' in text
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    small = code.replace("[207, 88]", "[2, 8]").replace("prefix(128)", "prefix(32)").replace("steps=64", "steps=4")
    names: dict = {"images": torch.rand(2, 3, 32, 32)}
    exec(compile(small, slug, "exec"), names)
    assert names["pictures"].shape[1:] == (3, 32, 32)
    assert names["tokens"].codes.ndim in (2, 3)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    blocks = "\n".join(re.findall(r"```[a-z]*\n(.*?)```", page.read_text(), re.DOTALL))
    for command in re.findall(r"^(?:\$ )?vistok ([a-z-]+)", blocks, re.MULTILINE):
        assert command in COMMANDS, f"{page.name} shows `vistok {command}`"


def test_himtoks_first_lines_of_python_run(tmp_path, monkeypatch):
    from vistok.data.masks import write_index

    monkeypatch.chdir(tmp_path)
    mask = np.zeros((70, 90), bool)
    mask[10:40, 20:60] = True
    write_index("masks.png", {1: mask, 2: ~mask})
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/systems/himtok.md").read_text(), re.DOTALL)
    assert code
    names: dict = {}
    exec(compile(code.group(1), "himtok.md", "exec"), names)
    assert names["rough"].shape == (2, 1, 70, 90)


def test_omnitokenizers_first_lines_of_python_run(tmp_path, monkeypatch):
    from tests.data.moving import moving
    from vistok.data.video import open_clip, write_clip

    monkeypatch.chdir(tmp_path)
    write_clip("clip.mp4", [moving(7)], rate=12)
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/systems/omnitokenizer.md").read_text(), re.DOTALL)
    assert code
    names: dict = {}
    exec(compile(code.group(1), "omnitokenizer.md", "exec"), names)
    assert names["rebuilt"].shape == (1, 3, 7, 48, 64)
    assert names["picture"].shape == (1, 3, 48, 64)
    assert open_clip("rebuilt.mp4").rate == 12


def test_the_lines_about_titoks_generators_run(monkeypatch):
    from vistok.nn.clip_text import TextFeatures

    stands_for = {
        "titok-l-32": "titok-tiny",
        "titok-generator-l-32": "titok-generator-tiny",
        "ta-titok-bl-128-vq": "titok-tiny-ta",
        "maskgen-vq-l": "maskgen-tiny-vq",
        "maskgen-kl-l": "maskgen-tiny-kl",
    }
    torch.manual_seed(0)
    create = vistok.create

    def features(texts, **options):
        return TextFeatures(torch.randn(len(texts), 5, 12), torch.randn(len(texts), 12))

    monkeypatch.setattr(vistok, "load", lambda name: create(stands_for[name]))
    monkeypatch.setattr("vistok.generators.titok.clip_text_condition", features)
    monkeypatch.setattr("vistok.tokenizers.titok.clip_text_features", lambda texts, **options: features(texts).states)
    section = (ROOT / "docs/systems/titok.md").read_text().split("\n## ")
    text = next(part for part in section if part.startswith("Generators"))
    assert all(f'"{name}"' in text and name in vistok.list_models("*") for name in stands_for)
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    code = code.replace("[207, 88]", "[2, 8]").replace("diffusion_steps=50", "diffusion_steps=5")
    some, none = features(["a", "b"]), features([""])
    names = {"vistok": vistok, "torch": torch, "states": some.states, "pooled": some.pooled}
    names |= {"no_states": none.states, "no_pooled": none.pooled}
    exec(compile(code, "titok.md", "exec"), names)
    assert names["pictures"].shape == (2, 3, 32, 32)
    assert torch.equal(names["again"].codes[names["keep"]], names["given"].codes[names["keep"]])
    assert names["vectors"].shape == (2, 8, 6)
