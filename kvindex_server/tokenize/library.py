"""The one door to the tokenizer library's encoding: ids, or why there are none."""

from tokenizers import Tokenizer as FastTokenizer


class NoIds(RuntimeError):
    """The library gives no ids for a text. The engine, which asks the same library, has none either."""


class Refused(NoIds):
    """It says so: a character that is in no token, and no token for unknown ones."""


class Panicked(NoIds):
    """It failed in itself."""


def ids(fast: FastTokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """The ids of one text by the library itself. NoIds."""
    try:
        # The batch call releases the GIL, which encode() holds for the whole text.
        return fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    except BaseException as error:
        if panic(error):
            raise Panicked("the tokenizer library panicked") from None
        if type(error) is Exception:  # the library has no other
            raise Refused("the tokenizer library refuses the text") from None
        raise


def panic(error: BaseException) -> bool:
    """Whether the library failed in itself; nobody who catches Exception would catch that."""
    return type(error).__module__ == "pyo3_runtime"
