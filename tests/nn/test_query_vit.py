"""The query ViT against the same computation written out position by position."""

import torch

from vistok.nn.query_vit import GridDecoder, QueryEncoder, ViTSize


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plainly(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def test_encoder_reads_the_query_positions():
    torch.manual_seed(0)
    encoder, pixels = QueryEncoder((2, 3), 4, 5, ViTSize(16, 2, 2)), draw(2, 3, 8, 12)
    patches = encoder.patches(pixels)
    first = encoder.class_token.expand(2, 1, -1)
    grid = torch.cat([first, patches], 1) + encoder.positions
    queries = (encoder.queries + encoder.query_positions).expand(2, -1, -1)
    x = plainly(encoder.blocks, encoder.norm_in(torch.cat([grid, queries], 1)))
    torch.testing.assert_close(encoder(pixels), encoder.norm_out(x[:, 7:]))


def test_decoder_reads_the_grid_positions_for_any_number_of_latents():
    torch.manual_seed(0)
    decoder, text = GridDecoder((2, 3), 5, 4, ViTSize(16, 2, 2), text=(7, 6)), draw(2, 7, 6)
    for count in (1, 3, 5):
        latents = draw(2, count, 4, seed=count)
        grid = torch.cat([decoder.class_token, decoder.mask_token.expand(6, -1)]) + decoder.positions
        parts = [grid.expand(2, -1, -1), decoder.embed(latents) + decoder.latent_positions[:count]]
        for words in (None, text):
            shown = parts if words is None else [*parts, decoder.text(words) + decoder.text_positions]
            x = plainly(decoder.blocks, decoder.norm_in(torch.cat(shown, 1)))
            torch.testing.assert_close(decoder(latents, words), decoder.norm_out(x[:, 1:7]))


def test_bfloat16_stays_bfloat16():
    torch.manual_seed(0)
    size = ViTSize(16, 1, 2)
    encoder, decoder = QueryEncoder((2, 2), 4, 3, size).bfloat16(), GridDecoder((2, 2), 3, 4, size).bfloat16()
    assert encoder(torch.rand(1, 3, 8, 8).bfloat16()).dtype == torch.bfloat16
    assert decoder(torch.rand(1, 3, 4).bfloat16()).dtype == torch.bfloat16


def test_initialisation_follows_the_authors_rule():
    torch.manual_seed(0)
    encoder = QueryEncoder((8, 8), 4, 32, ViTSize(256, 1, 4))
    assert abs(encoder.blocks[0].mlp.expand.weight.std() - 0.02) < 0.001
    assert not encoder.blocks[0].attention.qkv.bias.any()
    assert abs(encoder.positions.std() * 16 - 1) < 0.05


def test_narrow_models_may_begin_wider():
    torch.manual_seed(0)
    encoder = QueryEncoder((8, 8), 4, 32, ViTSize(64, 1, 4), init_std=0.06)
    decoder = GridDecoder((8, 8), 32, 12, ViTSize(64, 1, 4), init_std=0.06)
    for weight in (encoder.patches.project.weight, encoder.blocks[0].mlp.expand.weight, decoder.embed.weight):
        assert abs(weight.std() / 0.06 - 1) < 0.1
