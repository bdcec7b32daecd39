"""Turns text and chat bodies into the token ids that the engine would compute for them."""

from kvindex_server.tokenize.registry import load_tokenizer
from kvindex_server.tokenize.tokenizer import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
