"""LlamaGen as a Llama of the `transformers` library, and back: for serving and fine-tuning there, with equal logits.

    table, class_table  ->  embed_tokens   ids: codes 0 .. V-1, then classes, the last of which is none
    output              ->  lm_head        zero for the ids of classes, which generation suppresses
    rows of q and k     ->  pairs of neighbours become pairs of halves, within each head

Exactly the same function where positions are Llama's own (`positions="1d"`). The published models turn by row and
column, and not at all for the class, which no plain Llama does: `GridPositions` in place of its rotary embedding makes
it equal inside `transformers`; programs that read the folder by themselves (vLLM, llama.cpp) compute something else.
A text condition has no place in a Llama.
"""

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vistok.config import from_plain, to_plain
from vistok.errors import ConfigError, InputError, MismatchError, OutputError
from vistok.extras import import_extra
from vistok.nn.gpt import GPTSize
from vistok.nn.positions import Rotation
from vistok.vocabulary import Vocabulary

if TYPE_CHECKING:
    from vistok.generators.llamagen import LlamaGen, LlamaGenConfig

FACTS = "vistok"  # the entry of config.json that holds our config


class GridPositions(nn.Module):
    """A Llama's rotary embedding from a table: position ids (B, N) to cos and sin (B, N, head)."""

    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.cos, self.sin = (torch.cat([part, part], -1) for part in (rotation.cos, rotation.sin))

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (part.to(x.device)[position_ids].to(x.dtype) for part in (self.cos, self.sin))
        return cos, sin


def to_llama(model: "LlamaGen", custom_positions: bool = False) -> Any:
    """A `LlamaForCausalLM` with the same logits over codes. Raises ConfigError for what a Llama cannot be."""
    transformers, config = import_extra("transformers", "models"), model.config
    if config.text is not None:
        raise ConfigError(f"{model.name} reads projected features of text, for which a Llama has no place")
    if config.positions == "2d" and not custom_positions:
        raise ConfigError(
            f"{model.name} turns positions by row and column, which a plain Llama does not: custom_positions=True makes"
            " a Llama that does so inside transformers, or train one with positions='1d'"
        )
    size, vocabulary = config.trunk, vocabulary_of(config)
    classes = vocabulary.ids_of("class")
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary.size,
            hidden_size=size.width,
            intermediate_size=size.swiglu,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads or size.heads,
            head_dim=size.head,
            hidden_act="silu",
            rms_norm_eps=size.eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.base},
            max_position_embeddings=config.prefix + vocabulary.length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            **{FACTS: to_plain(config)},
        )
    )
    llama.to(model.dtype).load_state_dict(llama_state(model))
    llama.generation_config.suppress_tokens = list(classes)
    llama.generation_config.max_new_tokens = vocabulary.length
    if config.positions == "2d":
        install_positions(llama)
    return llama.eval().to(model.device)


def save_llama(model: "LlamaGen", folder: str | Path, custom_positions: bool = False) -> None:
    """Write `to_llama` as a folder of transformers, whole or not at all. Raises OutputError where it exists."""
    folder = Path(folder)
    if folder.exists():
        raise OutputError(f"{folder} exists; choose another folder")
    llama = to_llama(model, custom_positions)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        llama.save_pretrained(temporary / "model")
        os.replace(temporary / "model", folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def from_llama(cls: "type[LlamaGen]", source: Any, config: "LlamaGenConfig | None" = None) -> "LlamaGen":
    """A LlamaGen from a Llama: a `LlamaForCausalLM`, or a folder or Hub id that holds one.

    config   layout, classes and size of the pictures, for a Llama that was not made by `to_llama`: its ids are those of
             the codes, then of the classes and of none. Its trunk, positions and base are read from the Llama.

    Raises ConfigError for a Llama that LlamaGen cannot be, MismatchError where ids and config do not fit.
    """
    transformers = import_extra("transformers", "models")
    llama: Any = source if isinstance(source, nn.Module) else transformers.LlamaForCausalLM.from_pretrained(str(source))
    theirs = llama.config
    _check_kind(theirs)
    known = getattr(theirs, FACTS, None)
    if config is None:
        if known is None:
            raise InputError(
                "this Llama was not made from a LlamaGen: pass config=LlamaGenConfig(segments=.., classes=..), which "
                "says what its ids are"
            )
        from vistok.generators.llamagen import LlamaGenConfig

        config = from_plain(LlamaGenConfig, known, "the Llama's config.json: vistok")
    kv_heads = theirs.num_key_value_heads
    trunk = GPTSize(
        theirs.hidden_size,
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.intermediate_size,
        dropout=config.trunk.dropout,
        eps=theirs.rms_norm_eps,
        kv_heads=None if kv_heads == theirs.num_attention_heads else kv_heads,
    )
    if replace(trunk, hidden=None).swiglu == trunk.hidden:
        trunk = replace(trunk, hidden=config.trunk.hidden if config.trunk.hidden == trunk.hidden else None)
    grid = known is not None and known.get("positions") == "2d"
    base = float(theirs.rope_parameters["rope_theta"])
    config = replace(config, trunk=trunk, positions="2d" if grid else "1d", base=base)
    if vocabulary_of(config).size != theirs.vocab_size:
        raise MismatchError(
            f"a Llama of {theirs.vocab_size} ids; codes and classes of the config are {vocabulary_of(config).size}"
        )
    model = cls(config)
    model.load_state_dict(our_state(llama, model))
    return model.to(llama.dtype).eval()


def install_positions(llama: Any) -> Any:
    """Let a Llama made with custom positions, and loaded by transformers, turn by row and column. Returns it."""
    from vistok.generators.llamagen import LlamaGen, LlamaGenConfig

    known = getattr(llama.config, FACTS, None)
    if known is None:
        raise InputError("this Llama was not made from a LlamaGen: nothing says where its positions lie")
    config = from_plain(LlamaGenConfig, known, "the Llama's config.json: vistok")
    llama.model.rotary_emb = GridPositions(LlamaGen.rotation_of(config))
    return llama


def vocabulary_of(config: "LlamaGenConfig") -> Vocabulary:
    """Ids of a Llama: codes, then classes and none."""
    return Vocabulary(config.segments, extras={"class": (config.classes or 0) + (config.class_dropout > 0)})


def llama_state(model: "LlamaGen") -> dict[str, Tensor]:
    """The state dict of `to_llama`."""
    size, state = model.config.trunk, model.state_dict()
    classes = state["class_table.weight"]
    kv_heads = size.kv_heads or size.heads
    found = {
        "model.embed_tokens.weight": torch.cat([state["table.weight"], classes]),
        "lm_head.weight": torch.cat([state["output.weight"], torch.zeros_like(classes)]),
        "model.norm.weight": state["norm.weight"],
    }
    for index in range(size.depth):
        ours, theirs = f"trunk.{index}.", f"model.layers.{index}."
        sizes = [heads * size.head for heads in (size.heads, kv_heads, kv_heads)]
        q, k, v = state[ours + "attention.qkv.weight"].split(sizes)
        gate, value = state[ours + "mlp.expand.weight"].chunk(2)
        parts = {
            "self_attn.q_proj": _halves(q, size.head),
            "self_attn.k_proj": _halves(k, size.head),
            "self_attn.v_proj": v,
            "self_attn.o_proj": state[ours + "attention.out.weight"],
            "mlp.gate_proj": gate,
            "mlp.up_proj": value,
            "mlp.down_proj": state[ours + "mlp.contract.weight"],
            "input_layernorm": state[ours + "norm1.weight"],
            "post_attention_layernorm": state[ours + "norm2.weight"],
        }
        found |= {f"{theirs}{name}.weight": tensor.contiguous() for name, tensor in parts.items()}
    return found


def our_state(llama: Any, model: "LlamaGen") -> dict[str, Tensor]:
    """The state dict of a LlamaGen from that of a Llama: the inverse of `llama_state`."""
    state, size, codes = llama.state_dict(), model.config.trunk, model.vocabulary.size
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    found = {
        "table.weight": state["model.embed_tokens.weight"][:codes],
        "class_table.weight": state["model.embed_tokens.weight"][codes:],
        "output.weight": head[:codes],
        "norm.weight": state["model.norm.weight"],
    }
    for index in range(size.depth):
        ours, theirs = f"trunk.{index}.", f"model.layers.{index}."
        q, k = (_neighbours(state[f"{theirs}self_attn.{name}_proj.weight"], size.head) for name in "qk")
        found |= {
            ours + "attention.qkv.weight": torch.cat([q, k, state[theirs + "self_attn.v_proj.weight"]]),
            ours + "attention.out.weight": state[theirs + "self_attn.o_proj.weight"],
            ours + "mlp.expand.weight": torch.cat(
                [state[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up")]
            ),
            ours + "mlp.contract.weight": state[theirs + "mlp.down_proj.weight"],
            ours + "norm1.weight": state[theirs + "input_layernorm.weight"],
            ours + "norm2.weight": state[theirs + "post_attention_layernorm.weight"],
        }
    return found


def _halves(weight: Tensor, head: int) -> Tensor:
    """Rows (heads * head, W) whose pairs are (2i, 2i + 1) to pairs (i, i + head / 2)."""
    return weight.unflatten(0, (-1, head // 2, 2)).transpose(1, 2).flatten(0, 2)


def _neighbours(weight: Tensor, head: int) -> Tensor:
    """The inverse of `_halves`."""
    return weight.unflatten(0, (-1, 2, head // 2)).transpose(1, 2).flatten(0, 2)


def _check_kind(theirs: Any) -> None:
    """Raise ConfigError for a Llama that has what LlamaGen has not."""
    head = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    kind = (getattr(theirs, "rope_parameters", None) or {}).get("rope_type", "default")
    told = {
        f"it is a {theirs.model_type}": theirs.model_type != "llama",
        "its attention has biases": getattr(theirs, "attention_bias", False),
        "its MLP has biases": getattr(theirs, "mlp_bias", False),
        f"its activation is {theirs.hidden_act}": theirs.hidden_act != "silu",
        f"its positions are scaled ({kind})": kind != "default",
        f"its heads are {head} wide": head * theirs.num_attention_heads != theirs.hidden_size,
    }
    wrong = [words for words, here in told.items() if here]
    if wrong:
        raise ConfigError(f"LlamaGen cannot be this model: {', '.join(wrong)}")
