"""Turns text and chat bodies into the token ids that the engine would compute for them."""

from kvindex_server.tokenize.registry import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
