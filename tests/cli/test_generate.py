"""generate: grids and folders, conditions, seeds whatever the batch, whose tokenizer, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import vistok
from tests.cli.test_main import run
from vistok import catalogue
from vistok.cli.generate import asked, file_stem, grid_columns, own_options
from vistok.errors import InputError, MismatchError, UnknownNameError
from vistok.nn.t5_text import T5Features
from vistok.pairing import load_generator, save_pair
from vistok.pixels import from_pil, tiled
from vistok.tokens import Tokens

NAMES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "a tench, tinca")


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    generator = vistok.create("robusttok-rar-tiny", codebook_size=64).attach(vistok.create("vq-vae-tiny"))
    generator.class_names = NAMES
    return generator


@pytest.fixture(scope="module")
def model(pair, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("pair") / "model"
    save_pair(pair, folder)
    return str(folder)


def test_a_grid(capsys, model, tmp_path):
    grid = tmp_path / "grid.png"
    code, out, _ = run(capsys, "generate", "-m", model, "--class", "dog", "-n", "6", "-o", str(grid), "--json")
    document = json.loads(out)
    assert code == 0
    assert Image.open(grid).size == (3 * 34, 2 * 34)
    assert [image["condition"] for image in document["images"]] == ["dog"] * 6
    assert [image["seed"] for image in document["images"]] == list(range(6))
    assert document["seconds_per_image"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_a_file_each_with_its_tokens_whatever_the_batch(capsys, pair, model, tmp_path):
    words = ["generate", "-m", model, "-c", "dog,3", "-c", "Ship", "-n", "5", "--seed", "7", "--guidance", "1.5"]
    for size, name in (("5", "together"), ("2", "apart")):
        assert run(capsys, *words, "-o", str(tmp_path / name), "--batch-size", size)[0] == 0
    files = sorted(path.name for path in (tmp_path / "apart").iterdir())
    assert files[:4] == ["0-dog.png", "0-dog.vtok", "1-cat.png", "1-cat.vtok"]
    assert len(files) == 10
    for name in files:
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "together" / name).read_bytes()
    tokens = Tokens.load(tmp_path / "apart" / "4-cat.vtok")
    assert torch.equal(tokens.codes, pair.generate("cat", seed=11, guidance=1.5).codes)
    picture = pair.tokenizer.decode(tokens, dtype=torch.uint8)[0]
    assert torch.equal(picture, from_pil(Image.open(tmp_path / "apart" / "4-cat.png"))[0])


def test_settings_reach_the_sampler(capsys, pair, model, tmp_path):
    words = ["generate", "-m", model, "-c", "cat", "-n", "2", "--temperature", "0", "--option", "power=0"]
    assert run(capsys, *words, "-o", str(tmp_path / "out"))[0] == 0
    wanted = pair.generate("cat", count=2, temperature=0.0, power=0)
    assert torch.equal(Tokens.load(tmp_path / "out" / "1-cat.vtok").codes, wanted.codes[1:])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["-c", "doog"], "did you mean 'dog'"),
        (["-c", "12"], "0..9"),
        (["--prompt", "a dog"], "takes classes, not prompts"),
        (["--prompt", "a dog", "-c", "dog"], "either --class or --prompt"),
        (["-c", "dog", "--guidance", "-1"], "guidance=-1"),
        (["-c", "dog", "--temperature", "nan"], "temperature=nan"),
        (["-c", "dog", "--top-p", "0"], "top_p=0"),
        (["-c", "dog", "--steps", "4"], "it takes power"),
        (["-c", "dog", "--option", "powr=1"], "did you mean 'power'"),
        (["-c", "dog", "--option", "power"], "NAME=VALUE"),
        (["-c", "dog,cat,ship", "-n", "2"], "3 conditions for 2"),
        (["--tokenizer", "strata-tinny"], "strata-tiny"),
    ],
)
def test_what_is_refused_leaves_nothing_behind(capsys, model, tmp_path, words, told):
    code, out, err = run(capsys, "generate", "-m", model, "-n", "3", *words, "-o", str(tmp_path / "out.png"))
    assert (code, out) == (1, "")
    assert told in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(capsys, model, tmp_path):
    grid = tmp_path / "grid.png"
    grid.write_bytes(b"mine")
    words = ["generate", "-m", model, "-c", "dog", "-n", "1", "-o", str(grid)]
    assert run(capsys, *words)[0] == 1
    assert grid.read_bytes() == b"mine"
    assert run(capsys, *words, "--overwrite")[0] == 0
    assert Image.open(grid).size == (34, 34)


def test_prompts_go_to_a_model_that_reads_text(capsys, monkeypatch, tmp_path):
    torch.manual_seed(0)
    seen = []

    class Reader:
        def __init__(self, length, device):
            self.length = length

        def __call__(self, texts):
            seen.extend(texts)
            return T5Features(torch.ones(len(texts), self.length, 20))

    monkeypatch.setattr("vistok.nn.t5_text.T5Text", Reader)
    generator = vistok.create("llamagen-tiny-t2i").attach(vistok.create("vq-vae-tiny"))
    save_pair(generator, tmp_path / "model")
    words = ["generate", "-m", str(tmp_path / "model"), "-n", "2"]
    out = tmp_path / "out"
    assert run(capsys, *words, "-p", "a red bicycle", "-p", "fog", "-o", str(out))[0] == 0
    assert seen == ["a red bicycle", "fog"]
    assert sorted(path.name for path in out.iterdir())[:2] == ["0-a-red-bicycle.png", "0-a-red-bicycle.vtok"]
    code, _, err = run(capsys, *words, "-o", str(tmp_path / "grid.png"))
    assert code == 1
    assert "reads a text: --prompt" in err
    code, _, err = run(capsys, *words, "-c", "dog", "-o", str(tmp_path / "grid.png"))
    assert code == 1
    assert "takes no classes: --prompt" in err


def test_a_tokenizer_is_no_generator(capsys, tmp_path):
    code, _, err = run(capsys, "generate", "-m", "strata", "-o", str(tmp_path / "grid.png"))
    assert code == 1
    assert "strata is a tokenizer" in err


# -- a generator and its tokenizer -------------------------------------------------------------------------------------


def test_a_pair_on_disk_is_whole(pair, model):
    again = load_generator(model)
    assert again.class_names == NAMES
    assert again.tokenizer.fingerprint == pair.tokenizer.fingerprint
    assert torch.equal(again.generate("dog", seed=3).codes, pair.generate("dog", seed=3).codes)


def test_a_run_finds_the_tokenizer_of_its_own_stage(pair, tmp_path):
    torch.manual_seed(1)
    vistok.create("vq-vae-tiny").save(tmp_path / "stages" / "another")
    pair.tokenizer.save(tmp_path / "stages" / "tokenizer")
    pair.save(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text("model: {name: robusttok-rar-tiny}\n")
    for place in (tmp_path, tmp_path / "model"):
        assert load_generator(place).tokenizer.fingerprint == pair.tokenizer.fingerprint


def test_a_recipe_that_names_a_tokenizer_is_believed(pair, tmp_path):
    pair.tokenizer.save(tmp_path / "own")
    pair.save(tmp_path / "run" / "model")
    (tmp_path / "run" / "recipe.yaml").write_text(f"model: {{tokenizer: {json.dumps(str(tmp_path / 'own'))}}}\n")
    assert load_generator(tmp_path / "run").tokenizer.fingerprint == pair.tokenizer.fingerprint


def test_a_lone_generator_asks_for_its_tokenizer(pair, tmp_path):
    pair.save(tmp_path / "alone")
    with pytest.raises(UnknownNameError, match="--tokenizer"):
        load_generator(tmp_path / "alone")
    pair.tokenizer.save(tmp_path / "own")
    assert load_generator(tmp_path / "alone", tokenizer=tmp_path / "own").tokenizer is not None
    torch.manual_seed(2)
    with pytest.raises(MismatchError, match="was made for"):
        load_generator(tmp_path / "alone", tokenizer=vistok.create("vq-vae-tiny"))


def test_a_folder_of_other_class_names_is_refused(model, tmp_path):
    copied = tmp_path / "copy"
    copied.mkdir()
    for name in ("model.safetensors", "config.json"):
        (copied / name).write_bytes((Path(model) / name).read_bytes())
    plain = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(plain | {"class_names": ["cat"]}))
    with pytest.raises(vistok.VistokError, match="each of the 10 classes"):
        vistok.load(copied)


# -- small pieces ------------------------------------------------------------------------------------------------------


def test_conditions_take_turns(pair):
    assert asked(pair, ["dog,1", "a tench, tinca"], [], 4) == [5, 1, 9, 5]
    assert asked(pair, [], [], 12) == [*range(10), 0, 1]
    with pytest.raises(InputError, match="classes, not prompts"):
        asked(pair, [], ["a dog"], 1)


def test_names_of_files():
    assert file_stem(3, 100, "A tench, tinca") == "03-a-tench-tinca"
    assert file_stem(0, 1, None) == "0"
    assert "/" not in file_stem(0, 9, "../../etc")


def test_columns():
    assert [grid_columns(*pair) for pair in ((16, 1), (20, 10), (10, 10), (5, 2))] == [4, 10, 4, 3]


def test_own_options_are_yaml():
    assert own_options(["a=1", "b=[1, 2]", "c=on"]) == {"a": 1, "b": [1, 2], "c": True}


def test_tiles():
    pixels = torch.zeros(3, 3, 4, 5, dtype=torch.uint8)
    grid = tiled(pixels, 2, border=1)
    assert grid.shape == (3, 10, 12)
    assert grid[:, 5:9, 6:11].min() == 255  # the place left over
    assert grid[:, :4, :5].max() == 0


# -- the one that ships ------------------------------------------------------------------------------------------------


def test_the_generator_that_ships_needs_no_network(capsys, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    grid = tmp_path / "grid.png"
    code, out, _ = run(capsys, "generate", "--class", "dog", "-n", "16", "-o", str(grid), "--json")
    assert code == 0
    assert Image.open(grid).size == (4 * 34, 4 * 34)
    assert json.loads(out)["tokenizer"] == catalogue.find(catalogue.DEFAULT_GENERATOR).tokenizer
    code, _, err = run(capsys, "generate", "--class", "dgo", "-o", str(tmp_path / "other.png"))
    assert code == 1
    assert "did you mean 'dog'" in err


def test_what_ships_is_small_and_knows_its_tokenizer_by_name_too():
    gen = load_generator()
    assert len(gen.class_names) == gen.classes == 10
    assert vistok.load(gen.source.name).fingerprint == gen.source.weights
    folder = Path(vistok.__file__).parent / "weights" / gen.name
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 8_000_000
    a, b = gen.generate("dog", count=2, seed=1), gen.generate("ship", count=2, seed=1)
    assert not torch.equal(a.codes, b.codes)


# -- the catalogue -----------------------------------------------------------------------------------------------------

PAIRS = [(one.name, one.tokenizer) for one in catalogue.variants() if one.tokenizer is not None]


@pytest.mark.parametrize(("name", "tokenizer"), PAIRS, ids=[name for name, _ in PAIRS])
def test_the_tokenizer_beside_a_generator_is_one(name, tokenizer):
    there = catalogue.find(tokenizer)
    assert catalogue.find(name).role == "generator"
    assert there.role == "tokenizer"
    assert there.weights


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokenizer"), PAIRS, ids=[name for name, _ in PAIRS])
def test_the_tokenizer_beside_a_generator_has_its_layout(name, tokenizer):
    with torch.device("meta"):
        generator, theirs = vistok.create(name), vistok.create(tokenizer)
    assert theirs.spec.of(generator.spec.canvas).segments == generator.spec.segments
