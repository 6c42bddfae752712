"""The ViT classifier: prefixes, pooling, stems, what its keys say about it."""

from dataclasses import replace

import pytest
import torch

from vistok.errors import ConfigError, InputError
from vistok.nn.classifier import Classifier, ClassifierConfig, classifier_keys, recognise_classifier, weighted_mean

SMALL = ClassifierConfig(image=(24, 16), patch=8, width=64, depth=2, heads=1, classes=5)
KINDS = {
    "class": SMALL,
    "distilled": replace(SMALL, distill_token=True),
    "mae": replace(SMALL, pool="mean", norm_first=False),
    "no class token": replace(SMALL, class_token=False, pool="mean"),
    "no biases": replace(SMALL, qkv_bias=False),
    "cnn": replace(SMALL, patch=4, stem="cnn"),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_of_every_kind(kind):
    torch.manual_seed(0)
    config = KINDS[kind]
    net = Classifier(config).eval()
    pixels = torch.rand(2, 3, 24, 16)
    tokens = net.embed(pixels)
    assert tokens.shape == (2, config.prefix + config.grid[0] * config.grid[1], 64)
    logits = net(pixels)
    assert logits.shape == (2, 5)
    for block in net.blocks:
        tokens = block(tokens)
    ones = torch.ones(tokens.shape[:2])
    torch.testing.assert_close(net.classify(tokens, ones), logits)
    if config.pool == "mean":  # a token that stands for two counts as two
        doubled, sizes = torch.cat([tokens, tokens[:, -1:]], 1), ones.clone()
        sizes[:, -1] = 2
        torch.testing.assert_close(net.classify(tokens, sizes), net.classify(doubled))


def test_distilled_logits_are_the_mean_of_both_heads():
    torch.manual_seed(0)
    net = Classifier(KINDS["distilled"]).eval()
    tokens = torch.randn(2, 8, 64)
    normed = net.norm(tokens)
    assert net.distill_head is not None
    expected = (net.head(normed[:, 0]) + net.distill_head(normed[:, 1])) / 2
    torch.testing.assert_close(net.classify(tokens), expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("no biases", "cnn")])
def test_keys_there_and_back_tell_the_kind(kind):
    config = replace(KINDS[kind], image=(24, 24))
    net = Classifier(config)
    theirs = classifier_keys(config).to_theirs(net.state_dict())
    assert ("fc_norm.weight" in theirs) == (kind == "mae")
    assert ("dist_token" in theirs) == ("head_dist.bias" in theirs) == (kind == "distilled")
    back = classifier_keys(config).to_ours(theirs)
    assert back.keys() == net.state_dict().keys()
    assert recognise_classifier(theirs) == config


def test_only_qkv_lacks_its_bias():
    net = Classifier(KINDS["no biases"])
    names = [name for name, _ in net.named_parameters() if name.startswith("blocks.0.") and name.endswith("bias")]
    assert "blocks.0.attention.qkv.bias" not in names
    assert {"blocks.0.attention.out.bias", "blocks.0.mlp.expand.bias", "blocks.0.mlp.contract.bias"} <= set(names)


def test_a_mean_with_weights():
    tokens, sizes = torch.randn(2, 3, 4), torch.tensor([[1.0, 2, 3], [1, 1, 1]])
    torch.testing.assert_close(weighted_mean(tokens, sizes)[0], (tokens[0] * sizes[0][:, None]).sum(0) / 6)
    torch.testing.assert_close(weighted_mean(tokens, sizes)[1], tokens[1].mean(0))


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="do not tile"):
        ClassifierConfig(image=(30, 32), patch=8)
    with pytest.raises(ConfigError, match="needs class_token"):
        ClassifierConfig(class_token=False)
    with pytest.raises(ConfigError, match="after a class token"):
        ClassifierConfig(class_token=False, pool="mean", distill_token=True)
    with pytest.raises(ConfigError, match="patches of 4"):
        ClassifierConfig(stem="cnn")
    with pytest.raises(InputError, match="this network takes"):
        Classifier(SMALL)(torch.rand(1, 3, 16, 16))
