"""Laws of the VQGAN CNN that no published number can see."""

import pytest
import torch
import torch.nn.functional as F

from vistok.errors import ConfigError, InputError
from vistok.nn.cnn import CNNConfig, CNNDecoder, CNNEncoder, Downsample, Upsample

SMALL = {"width": 32, "multipliers": (1, 2, 2), "blocks": 1, "latent_dim": 6}


@pytest.mark.parametrize("style", ["taming", "maskgit"])
def test_shapes_and_paths_with_and_without_gradients_agree(style):
    torch.manual_seed(0)
    config = CNNConfig(**SMALL, style=style, attention=(2,) if style == "taming" else ())
    encoder, decoder = CNNEncoder(config), CNNDecoder(config)
    pixels = torch.rand(2, 3, 16, 24)
    latent = encoder(pixels)
    image = decoder(latent)
    assert latent.shape == (2, 6, 4, 6)
    assert image.shape == (2, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), latent, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoder(latent), image, rtol=1e-5, atol=1e-5)


def test_inference_changes_neither_input_nor_weights():
    torch.manual_seed(1)
    decoder = CNNDecoder(CNNConfig(**SMALL))
    latent = torch.randn(1, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    before = latent.clone(), {name: value.clone() for name, value in decoder.state_dict().items()}
    with torch.no_grad():
        decoder(latent)
    assert torch.equal(latent, before[0])
    assert all(torch.equal(value, before[1][name]) for name, value in decoder.state_dict().items())


def test_inference_settles_weights_once_and_leaves_them_trainable():
    encoder = CNNEncoder(CNNConfig(**SMALL))
    versions = [parameter._version for parameter in encoder.parameters()]
    with torch.inference_mode():
        encoder(torch.rand(1, 3, 8, 8))
    assert encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    places = [parameter.data_ptr() for parameter in encoder.parameters()]
    with torch.no_grad():
        encoder(torch.rand(1, 3, 8, 8))
    assert places == [parameter.data_ptr() for parameter in encoder.parameters()]
    assert versions == [parameter._version for parameter in encoder.parameters()]
    encoder(torch.rand(1, 3, 8, 8)).sum().backward()
    assert encoder.conv_in.weight.grad is not None


def test_upsample_in_four_phases_is_nearest_then_convolution():
    torch.manual_seed(2)
    upsample = Upsample(32).double()
    upsample.conv.weight.data += 1  # nothing cancels
    x = torch.randn(2, 32, 3, 5, dtype=torch.double)
    with torch.no_grad():
        torch.testing.assert_close(upsample(x), upsample.conv(F.interpolate(x, scale_factor=2)), rtol=1e-12, atol=1e-12)


def test_downsample_pads_right_and_below_alone():
    down = Downsample(32)
    with torch.no_grad():
        down.conv.weight.zero_()
        down.conv.bias.zero_()
        down.conv.weight[0, 0, 0, 0] = 1  # reads the window's first pixel, which must be pixel (2 i, 2 j)
        x = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 32, 4, 4)
        assert down(x)[0, 0].tolist() == [[0, 2], [8, 10]]


def test_double_latent_gives_mean_and_log_variance():
    encoder = CNNEncoder(CNNConfig(**SMALL, double_latent=True))
    assert encoder(torch.rand(1, 3, 8, 8)).shape == (1, 12, 2, 2)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(3)
    encoder = CNNEncoder(CNNConfig(**SMALL, dropout=0.5))
    x = torch.rand(1, 3, 8, 8)
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))


def test_every_norm_has_as_many_groups_as_asked():
    config = CNNConfig(width=16, multipliers=(1, 2), blocks=1, latent_dim=4, attention=(1,), groups=4)
    for part in (CNNEncoder(config), CNNDecoder(config)):
        norms = [module for module in part.modules() if isinstance(module, torch.nn.GroupNorm)]
        assert len(norms) > 5
        assert {norm.num_groups for norm in norms} == {4}


def test_bad_configs_and_sizes_are_refused():
    with pytest.raises(ConfigError, match="multiples of 32"):
        CNNConfig(width=20)
    with pytest.raises(ConfigError, match="multiples of 8"):
        CNNConfig(width=20, groups=8)
    with pytest.raises(ConfigError, match=r"levels are 0\.\.4"):
        CNNConfig(attention=(5,))
    with pytest.raises(ConfigError, match="no attention"):
        CNNConfig(style="maskgit", attention=(1,))
    with pytest.raises(InputError, match="multiples of 4"):
        CNNEncoder(CNNConfig(**SMALL))(torch.rand(1, 3, 10, 8))
