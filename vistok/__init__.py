"""vistok: visual tokenizers. Images, video, shapes and masks to tokens and back, and what is built on those tokens.

tok = vistok.load()                 # the tokenizer that ships; load("titok-l-32") published weights
tokens = tok.encode(images)         # Tokens
images = tok.decode(tokens.prefix(k))
fast = vistok.reduce(vit, "tome")   # fewer tokens inside a ViT or a LLaVA, until fast.remove()
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vistok.applied import reduce as reduce
    from vistok.catalogue import list_models as list_models
    from vistok.errors import VistokError as VistokError
    from vistok.generator import Generator as Generator
    from vistok.layout import Canvas as Canvas
    from vistok.layout import Segment as Segment
    from vistok.layout import Sizes as Sizes
    from vistok.layout import TokenSpec as TokenSpec
    from vistok.loading import load as load
    from vistok.reducer import Reducer as Reducer
    from vistok.registry import create as create
    from vistok.registry import register as register
    from vistok.registry import systems as systems
    from vistok.tokenizer import Tokenizer as Tokenizer
    from vistok.tokens import Tokens as Tokens

__version__ = "0.1.0"

_HOME = {
    "list_models": "catalogue",
    "VistokError": "errors",
    "Generator": "generator",
    "Canvas": "layout",
    "Segment": "layout",
    "Sizes": "layout",
    "TokenSpec": "layout",
    "Reducer": "reducer",
    "create": "registry",
    "load": "loading",
    "reduce": "applied",
    "register": "registry",
    "systems": "registry",
    "Tokenizer": "tokenizer",
    "Tokens": "tokens",
}
__all__ = sorted(_HOME)

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vistok' has no attribute {name!r}")
    value = getattr(import_module(f"vistok.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
