"""The CLIP score on a tiny CLIP made on the spot: its definition, what pictures and captions become, what it says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.pictures import picture
from vistok.errors import InputError, MismatchError, UnknownNameError
from vistok.metrics.clip_score import build_clip_score, clip_score

transformers = pytest.importorskip("transformers")
SIDE = 32


def tiny_clip(where):
    """A CLIP of random weights whose tokenizer knows letters alone, saved as `from_pretrained` reads it."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {word: place for place, word in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    where.mkdir(parents=True)
    (where / "vocab.json").write_text(json.dumps(vocabulary))
    (where / "merges.txt").write_text("#version: 0.2\n")
    try:
        words = CLIPTokenizer(str(where / "vocab.json"), str(where / "merges.txt"))
        assert len(words("ab").input_ids) == 4
    except (AssertionError, TypeError):  # since version 5 it takes what the files hold
        words = CLIPTokenizer(vocab=vocabulary, merges=[])
    words.save_pretrained(where)
    ends = {"bos_token_id": len(letters), "eos_token_id": len(letters) + 1, "pad_token_id": len(letters) + 1}
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=tower | ends | {"vocab_size": len(vocabulary), "max_position_embeddings": 12},
        vision_config=tower | {"image_size": SIDE, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def judge(folder):
    return build_clip_score(str(folder))


def pixels(count, size=(SIDE, SIDE)):
    return torch.from_numpy(np.stack([np.asarray(picture(n, size)) for n in range(count)])).permute(0, 3, 1, 2)


def test_definition():
    pictures = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    texts = torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
    wanted = torch.tensor([100.0, 100 / 2**0.5, 0.0])
    assert torch.allclose(clip_score(pictures, texts), wanted)
    assert torch.allclose(clip_score(pictures, texts, "hessel"), wanted / 40)
    with pytest.raises(UnknownNameError, match="did you mean"):
        clip_score(pictures, texts, "hesel")
    with pytest.raises(InputError, match="embeddings"):
        clip_score(pictures, texts[:2])


def test_it_is_the_networks_cosine(folder, judge):
    """Against the whole network of transformers, fed by hand."""
    images, captions = pixels(3), ["a bear", "the sea and a house", "x"]
    network = transformers.CLIPModel.from_pretrained(folder).eval()
    words = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = words(captions, padding=True, truncation=True, max_length=12, return_tensors="pt")
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        found = network(pixel_values=(images / 255 - mean) / deviation, **inputs)
    cosine = (found.image_embeds * found.text_embeds).sum(1)
    assert cosine.abs().max() > 0.01
    assert torch.allclose(judge(images, captions), 100 * cosine.clamp_min(0), atol=1e-4)
    one = torch.cat([judge(images[n : n + 1], captions[n : n + 1]) for n in range(3)])
    assert torch.allclose(one, judge(images, captions), atol=1e-4), "padding and batch do not matter"


def test_pictures_are_resized_by_their_shorter_side_and_cut(judge):
    image = picture(4, (50, 90))
    small = image.resize((int(90 * SIDE / 50), SIDE), Image.Resampling.BICUBIC)
    left = round((small.width - SIDE) / 2)
    by_hand = np.asarray(small.crop((left, 0, left + SIDE, SIDE)))
    given, cut = (torch.from_numpy(np.asarray(x).copy()).permute(2, 0, 1)[None] for x in (image, by_hand))
    assert torch.equal(judge.pictures(given), judge.pictures(cut))


def test_long_captions_are_cut(judge):
    long = "a b c d e f g h i j"
    assert torch.equal(judge.texts([long + " k l m"]), judge.texts([long]))
    assert not torch.allclose(judge.texts(["a b"]), judge.texts([long]))


def test_the_folders_own_preprocessing_is_taken(folder, judge, tmp_path):
    import shutil

    other = shutil.copytree(folder, tmp_path / "other")
    (other / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert not torch.allclose(build_clip_score(str(other)).pictures(pixels(1)), judge.pictures(pixels(1)), atol=1e-4)


def test_what_it_says_of_itself(judge):
    told = judge.protocol
    assert told["variant"] == "100 max(cos, 0)"
    assert told["extractor"] == "tiny"
    assert len(told["extractor weights"]) == 12
    assert (told["extractor side"], told["caption tokens"]) == (SIDE, 12)


def test_mistakes(judge, tmp_path):
    with pytest.raises(InputError, match="one for each"):
        judge(pixels(2), ["one"])
    with pytest.raises(InputError, match="uint8"):
        judge.pictures(pixels(1).float())
    (tmp_path / "empty").mkdir()
    with pytest.raises(MismatchError, match="no CLIP with its tokenizer"):
        build_clip_score(str(tmp_path / "empty"))
    with pytest.raises(UnknownNameError, match="no variant"):
        build_clip_score(str(tmp_path), "best")
