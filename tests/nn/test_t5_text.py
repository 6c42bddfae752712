"""T5's features stand at the right, zeros before them; a tiny random T5 from a folder reads strings."""

import pytest
import torch

from vistok.errors import InputError, VistokError
from vistok.nn.t5_text import T5Features, T5Text, to_the_right


def test_padding_goes_to_the_left():
    features = torch.arange(1, 9.0).reshape(2, 4, 1)
    told = to_the_right(features, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool())
    assert told.features[..., 0].tolist() == [[0, 0, 1, 2], [5, 6, 7, 8]]
    assert told.present.tolist() == [[False, False, True, True], [True] * 4]


def test_shapes_are_checked():
    with pytest.raises(InputError, match="features are float"):
        T5Features(torch.zeros(2, 3))
    with pytest.raises(InputError, match="mask"):
        T5Features(torch.zeros(2, 3, 4), torch.ones(2, 2))
    assert T5Features(torch.zeros(2, 3, 4)).present.all()
    with pytest.raises(InputError, match="list of strings"):
        T5Text()("one")


def test_a_model_that_cannot_be_had_is_named(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(VistokError, match="cannot get the text model"):
        T5Text(str(tmp_path / "none"))(["a dog"])


def test_strings_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "dog": 4, "cat": 5}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=6, d_model=20, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    encoder = transformers.T5EncoderModel(config)
    encoder.save_pretrained(tmp_path)
    told = T5Text(str(tmp_path), length=6)(["A dog ", "a cat a dog"])
    assert told.features.shape == (2, 6, 20)
    assert told.present.sum(1).tolist() == [2, 4]
    assert bool((told.features[0, :4] == 0).all())
    with torch.no_grad():
        alone = encoder.eval()(input_ids=torch.tensor([[3, 4]])).last_hidden_state
    torch.testing.assert_close(told.features[0, 4:], alone[0], atol=1e-5, rtol=1e-4)
