"""Which files let another library cut captions into the same tokens?"""

from open_clip import SimpleTokenizer
from open_clip.tokenizer import HFTokenizer

from dist_siglip.models.build import BuiltModel
from dist_siglip.models.tokenizer import ModelTokenizer


def tokenizer_of(built: BuiltModel) -> SimpleTokenizer | HFTokenizer:
    """Return the tokenizer of a model, loaded.

    Raises:
        TypeError: If the model was given a tokenizer that is none of open_clip.
    """
    if not isinstance(built.tokenizer, ModelTokenizer):
        raise TypeError(f"{type(built.tokenizer).__name__} is no tokenizer of open_clip")
    return built.tokenizer.loaded()
