"""Reducers inside models of transformers and timm: small random ones, by the numbers that a plain loop gives."""

import copy

import pytest
import torch
import transformers
from torch import nn

import vistok
from vistok.applied import find_blocks
from vistok.errors import InputError, UnknownNameError
from vistok.nn.flops import count_flops
from vistok.nn.vit import ViT, ViTConfig
from vistok.prompts import Prompt, prune, splice
from vistok.reducers.divprune import DivPrune, DivPruneConfig
from vistok.reducers.tome import match, merge_weighted

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 40,
    "patch_size": 8,
}


def vit(**changes):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VISION, num_labels=5, **changes)
    return transformers.ViTForImageClassification(config).eval()


def clip(model=None, **changes):
    torch.manual_seed(0)
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION, **changes)).eval()


def llava():
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=60,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_id=59,
        vision_feature_layer=-2,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def pixels(batch=2, side=40):
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


class TimmAttention(nn.Module):
    """timm's names."""

    def __init__(self, width, heads):
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (self.q_norm(q) * self.scale @ self.k_norm(k).mT).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class TimmBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(width), TimmAttention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.ls1, self.ls2, self.drop_path1, self.drop_path2 = Gain(width), Gain(width), nn.Identity(), nn.Identity()

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Gain(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x):
        return x * self.gamma


class TimmViT(nn.Module):
    global_pool = "avg"
    num_prefix_tokens = 5  # a class token and four registers

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 8, stride=8)
        self.prefix = nn.Parameter(torch.randn(1, 5, 24))
        self.blocks = nn.Sequential(*(TimmBlock(24, 3) for _ in range(3)))

    def pool(self, x, pool_type=None):
        return x[:, 5:].mean(1)

    def forward(self, images):
        x = self.embed(images).flatten(2).mT
        return self.pool(self.blocks(torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)))


MODELS = {
    "vit": (vit, lambda model, x: model(x).logits, 1),
    "vit-eager": (lambda: vit(attn_implementation="eager"), lambda model, x: model(x).logits, 1),
    "clip": (clip, lambda model, x: model(x).pooler_output, 1),
    "deit": (
        lambda: torch.manual_seed(0) and transformers.DeiTModel(transformers.DeiTConfig(**VISION)).eval(),
        lambda model, x: model(x).pooler_output,
        2,
    ),
    "siglip": (
        lambda: (
            torch.manual_seed(0) and transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)).eval()
        ),
        lambda model, x: model(x).pooler_output,
        0,
    ),
    "dinov2": (
        lambda: torch.manual_seed(0) and transformers.Dinov2Model(transformers.Dinov2Config(**VISION)).eval(),
        lambda model, x: model(x).pooler_output,
        1,
    ),
    "timm": (lambda: torch.manual_seed(0) and TimmViT().eval(), lambda model, x: model(x), 5),
    "vistok": (
        lambda: torch.manual_seed(0) and ViT(ViTConfig(image=40, patch=8, width=32, depth=3, heads=4)).eval(),
        lambda model, x: model(x)[:, 0],
        1,
    ),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_without_merging_nothing_changes_and_it_comes_out_again(name):
    build, out, protected = MODELS[name]
    model = build()
    expected = out(model, pixels())
    with vistok.reduce(model, "tome", r=0) as still:
        torch.testing.assert_close(out(model, pixels()), expected, atol=1e-5, rtol=1e-5)
        assert still.counts == [25 + protected] * 3
    with vistok.reduce(model, "tome", r=4) as applied:
        merged = out(model, pixels())
        assert merged.shape == expected.shape
        assert not torch.allclose(merged, expected, atol=1e-4)
        assert applied.protected == protected
        assert applied.counts == [21 + protected, 17 + protected, 13 + protected] == list(applied.plan(25 + protected))
        assert [state.sizes.sum(1).tolist() for state in applied.states] == [[25.0 + protected] * 2] * 3
        assert applied.restore(torch.zeros(2, 13 + protected, 7)).shape == (2, 25 + protected, 7)
        flops = applied.flops(pixels())
        assert flops.after == count_flops(model, pixels()) < flops.before
        assert 0.5 < flops.ratio < 0.9
    assert torch.equal(out(model, pixels()), expected)
    assert "forward" not in vars(next(iter(find_blocks(model)[1])))


@pytest.mark.parametrize("proportional", [True, False])
@torch.no_grad()
def test_a_vit_of_transformers_by_a_plain_loop(proportional):
    model = vit()
    with vistok.reduce(model, "tome", r=(5, 3), proportional=proportional):
        found = model(pixels()).logits
    trunk = model.vit
    x, sizes = trunk.embeddings(pixels()), None
    for layer, r in zip(trunk.layers, (5, 3, 0), strict=True):
        y, attention = layer.layernorm_before(x), layer.attention
        q, k, v = (
            project(y).unflatten(-1, (4, 8)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        logits = q @ k.mT / 8**0.5
        if proportional and sizes is not None:
            logits = logits + sizes.log()[:, None, None]
        x = x + attention.o_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x, sizes = merge_weighted(x, match(k.mean(1), r, protected=1), sizes)
        x = x + layer.mlp(layer.layernorm_after(x))
    torch.testing.assert_close(found, model.classifier(trunk.layernorm(x)[:, 0]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_copies_of_a_token_change_nothing_under_proportional_attention():
    """Merging exact duplicates is free: the mean is the token, and log sizes count it as often as before."""
    model = clip()
    model.embeddings.position_embedding.weight[1:] = 0
    image = pixels(1, 8).tile(1, 1, 5, 5)  # 25 patches alike
    expected = model(image).pooler_output
    with vistok.reduce(model, "tome", r=12):
        torch.testing.assert_close(model(image).pooler_output, expected, atol=1e-5, rtol=1e-5)
    with vistok.reduce(model, "tome", r=12, proportional=False):
        assert not torch.allclose(model(image).pooler_output, expected, atol=1e-4)


@torch.no_grad()
def test_timms_mean_is_over_patches():
    model = MODELS["timm"][0]()
    seen = {}
    own = model.pool
    with vistok.reduce(model, "tome", r=4) as applied:
        hook = model.blocks[-1].register_forward_hook(lambda module, args, output: seen.update(x=output))
        found = model(pixels())
        hook.remove()
        x, sizes = seen["x"][:, 5:], applied.run.sizes[:, 5:]
        assert applied.run.sizes[:, :5].tolist() == [[1.0] * 5] * 2
    torch.testing.assert_close(found, (x * sizes[..., None]).sum(1) / 25)
    assert model.pool == own


@torch.no_grad()
def test_selection_acts_at_one_block():
    model = vit()
    with vistok.reduce(model, "divprune", at=(1,), keep=6) as applied:
        model(pixels())
        assert applied.counts == [26, 7, 7]
        assert applied.states[0].index[:, 0].tolist() == [0, 0]


def test_a_copy_of_a_model_has_its_own():
    model = vit()
    with vistok.reduce(model, "tome", r=4):
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.data.zero_()
        assert twin(pixels()).logits.std().item() > 0
    assert model(pixels()).logits.std().item() == 0


def test_gradients_flow_through_a_model_with_a_reducer():
    model = vit().train()
    with vistok.reduce(model, "tome", r=4):
        model(pixels()).logits.square().sum().backward()
    assert float(model.vit.layers[0].mlp.fc1.weight.grad.abs().sum()) > 0


def test_models_without_a_place_are_told_which_have_one():
    with pytest.raises(InputError, match=r"Linear has no place for a reducer.*CLIP"):
        vistok.reduce(nn.Linear(3, 3), "tome")
    swin = transformers.SwinModel(transformers.SwinConfig(image_size=32, embed_dim=16, depths=[1], num_heads=[2]))
    with pytest.raises(InputError, match=r"Swin.*have none"):
        vistok.reduce(swin, "tome")
    dinov3 = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VISION)).eval()
    with pytest.raises(InputError, match=r"no place|rotary positions"), vistok.reduce(dinov3, "tome", r=2):
        dinov3(pixels())
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=9, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    with pytest.raises(InputError, match="a mask over them"), vistok.reduce(text, "tome", r=2):
        text(torch.ones(1, 5, dtype=torch.long))
    model = vit()
    with pytest.raises(InputError, match="acts once"):
        vistok.reduce(model, "divprune")
    with pytest.raises(InputError, match="no prompt with visual tokens"):
        vistok.reduce(model, "divprune", place="prompt")
    with pytest.raises(InputError, match=r"expected some of 0 to 2"):
        vistok.reduce(model, "divprune", at=(3,))
    with pytest.raises(InputError, match="no reducer"):
        vistok.reduce(model, "titok-tiny")
    with pytest.raises(UnknownNameError, match="tome"):
        vistok.reduce(model, "tomee")
    with vistok.reduce(model, "tome"), pytest.raises(InputError, match="already"):
        vistok.reduce(model, "tome")
    with vistok.reduce(model, "divprune", at=(0,), keep=26), pytest.raises(InputError, match="keep 26 of 25"):
        model(pixels())
    with pytest.raises(InputError, match="prompt"):
        vistok.reduce(llava(), "tome", place="block")


def test_the_vision_half_of_a_clip_is_found():
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 9,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        vision_config=VISION,
    )
    model = transformers.CLIPModel(config).eval()
    with vistok.reduce(model, "tome", r=4) as applied, torch.no_grad():
        model.get_image_features(pixels())
        assert applied.counts == [22, 18, 14]


# -- LLaVA -----------------------------------------------------------------------------------------------------------


def prompts():
    """Two prompts with a picture of 25 tokens each, the second shorter and padded on the left."""
    rows = [[1, 5, 6, *[59] * 25, 7, 8, 9], [0, 0, 1, 5, *[59] * 25, 7, 8]]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pixel_values": pixels()}


@torch.no_grad()
def test_a_llava_reads_the_tokens_that_are_left():
    model, inputs = llava(), prompts()
    with vistok.reduce(model, "divprune", ratio=0.2) as applied:
        found = model(**inputs).logits
        kept = applied.prompt
        flops = applied.flops(**inputs)
    assert found.shape[1] == 31 - 25 + 5
    assert flops.after < flops.before
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    for item, row in enumerate(inputs["input_ids"].tolist()):
        chosen = DivPrune(DivPruneConfig(ratio=0.2)).reduce(features[item][None])[1].index[0]
        text = [place for place, one in enumerate(row) if one not in (0, 59)]
        places = sorted([*text, *(row.index(59) + one for one in chosen.tolist())])
        embeds = model.get_input_embeddings()(torch.tensor(row)).clone()
        embeds[row.index(59) : row.index(59) + 25] = features[item]
        expected = model(inputs_embeds=embeds[places][None]).logits[0]
        here = kept.mask[item].bool()
        assert kept.positions[item][here].tolist() == places
        torch.testing.assert_close(found[item][here], expected, atol=2e-5, rtol=2e-5)
        assert kept.position_ids[item][here].tolist() == list(range(len(places)))


@torch.no_grad()
def test_a_llava_generates_from_the_tokens_that_are_left():
    model, inputs = llava(), prompts()
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with vistok.reduce(model, "divprune", ratio=0.2) as applied:
        answer = model.generate(**inputs, **options)
        told = model.generate(**inputs, **options, return_dict_in_generate=True)
        embeds, mask = applied.prompt.embeds, applied.prompt.mask
        alone = {name: value[1:] for name, value in inputs.items()}
        single = model.generate(**alone, **options)
    assert answer.shape == plain.shape == (2, 37)
    assert torch.equal(answer[:, :31], inputs["input_ids"])
    assert torch.equal(told.sequences, answer)
    assert torch.equal(single, answer[1:])
    for step in range(6):  # greedy, without a cache
        logits = model(inputs_embeds=embeds, attention_mask=mask).logits[:, -1]
        assert torch.equal(logits.argmax(-1), answer[:, 31 + step])
        embeds = torch.cat([embeds, model.get_input_embeddings()(answer[:, 31 + step])[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert torch.equal(model.generate(**inputs, **options), plain)


def test_labels_follow_the_tokens():
    model, inputs = llava(), prompts()
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] != 8, -100)
    with vistok.reduce(model, "divprune", ratio=0.2) as applied:
        out = model(**inputs, labels=labels)
        out.loss.backward()
    assert torch.isfinite(out.loss)
    here = applied.prompt.positions
    wanted = out.logits[:, :-1].log_softmax(-1)
    rows = [
        -wanted[item, place - 1, 8]
        for item in range(2)
        for place in range(here.shape[1])
        if here[item, place] >= 0 and labels[item, here[item, place]] == 8
    ]
    torch.testing.assert_close(out.loss, torch.stack(rows).mean())


@torch.no_grad()
def test_merging_works_at_the_prompt_too():
    model, inputs = llava(), prompts()
    with vistok.reduce(model, "tome", r=10) as applied:
        assert model(**inputs).logits.shape[1] == 21
        assert applied.states[0].sizes.sum(1).tolist() == [25.0, 25.0]


def test_several_pictures_and_none_in_a_batch():
    rng = torch.Generator().manual_seed(0)
    visual = torch.zeros(3, 30, dtype=torch.bool)
    visual[0, 2:12], visual[0, 15:21], visual[2, 4:24] = True, True, True
    features = [torch.randn(length, 8, generator=rng) for length in (10, 6, 20)]
    embeds = torch.randn(3, 30, 8, generator=rng)
    whole = splice(embeds, torch.ones(3, 30, dtype=torch.long), visual, features)
    prompt, (state,) = prune(DivPrune(DivPruneConfig(ratio=0.5)), whole)
    assert prompt.lengths == [5, 3, 10]
    assert prompt.mask.sum(1).tolist() == [22, 30, 20]
    assert torch.equal(prompt.embeds[1], embeds[1])
    assert state.keep.sum(1).tolist() == [5, 3, 10]
    for item in range(3):
        here = prompt.positions[item] >= 0
        assert torch.equal(prompt.embeds[item][here], whole.embeds[item][prompt.positions[item][here]])
        assert float(prompt.embeds[item][~here].abs().sum()) == 0
    with pytest.raises(vistok.VistokError, match="36 image tokens in the prompt, 30 visual tokens"):
        splice(embeds, whole.mask, visual, [features[0], features[2]])
    with pytest.raises(InputError, match="at least 1 each"):
        prune(DivPrune(DivPruneConfig()), Prompt(embeds, whole.mask, visual, [0, 36]))
