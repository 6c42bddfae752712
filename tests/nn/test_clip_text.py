"""What generators read of CLIP, from a small tower of the transformers package itself."""

import json

import pytest
import torch

from vistok.errors import InputError
from vistok.nn import clip_text

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    """A CLIP text tower of random weights with a tokenizer of single letters."""
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=7, projection_dim=16, bos_token_id=58, eos_token_id=59, pad_token_id=59,
    )  # fmt: skip
    transformers.CLIPTextModelWithProjection(config).save_pretrained(tmp_path)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {token: number for number, token in enumerate([*letters, *(f"{one}</w>" for one in letters)])}
    vocabulary |= {"<|startoftext|>": 58, "<|endoftext|>": 59}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return str(tmp_path)


def test_states_before_the_last_block_and_the_projected_end(folder):
    found = clip_text.clip_text_condition(["a dog", ""], folder)
    assert found.states.shape == (2, 7, 16)
    assert found.pooled.shape == (2, 16)
    model = transformers.CLIPTextModelWithProjection.from_pretrained(folder).eval()
    ids = torch.tensor([[58, 26, 3, 14, 32, 59, 0], [58, 59, 0, 0, 0, 0, 0]])
    seen = []
    layers = model.text_model.encoder.layers if hasattr(model, "text_model") else model.encoder.layers
    layers[1].register_forward_hook(
        lambda module, args, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
    )
    with torch.no_grad():
        whole = model(input_ids=ids)
    torch.testing.assert_close(found.states, seen[0])
    ends = whole.last_hidden_state[torch.arange(2), torch.tensor([5, 1])]
    torch.testing.assert_close(found.pooled, model.text_projection(ends))
    torch.testing.assert_close(clip_text.clip_text_features(["a dog", ""], folder), whole.last_hidden_state)


def test_one_text_serves_many_items(folder):
    one = clip_text.clip_text_condition(["a"], folder)
    assert len(one.expand(3)) == 3
    with pytest.raises(InputError, match="2 texts for 3"):
        clip_text.clip_text_condition(["a", "b"], folder).expand(3)
    with pytest.raises(InputError, match="list of strings"):
        clip_text.clip_text_condition("a", folder)
