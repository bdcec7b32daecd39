"""The parser of `kvindex`: wrong usage names what was probably meant."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from kvindex_server.commands.failure import meant

_CHOICE = re.compile(r"invalid choice: '(.*?)'")


class Parser(argparse.ArgumentParser):
    """As argparse's, without abbreviations."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **arguments})
        self._given: list[str] = []

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As of argparse; what is unknown is an error of the command it was given to."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = self.commands().get(getattr(found, "command", ""), self)
            first = next((each for each in unknown if each.startswith("-")), unknown[0])
            given = first.partition("=")[0]
            command.error(
                f"unknown {'option' if first.startswith('-') else 'argument'}: {given}{meant(given, _options(command))}"
            )
        return found

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As of argparse; what is given is kept, for an option that is missing may be one that was mistyped."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def commands(self) -> dict[str, argparse.ArgumentParser]:
        """By name."""
        return {
            name: command
            for action in self._actions
            if isinstance(action, argparse._SubParsersAction)
            for name, command in action.choices.items()
        }

    def error(self, message: str) -> NoReturn:
        """Short usage and one line; exit code 2."""
        wrong = _CHOICE.search(message)
        if wrong is not None:
            choices = [str(each) for action in self._actions for each in action.choices or ()]
            message = f"{message[: wrong.end()]}{meant(wrong[1], choices)} (one of {', '.join(choices)})"
        elif "required" in message:
            message += self._mistyped()
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")

    def _mistyped(self) -> str:
        options = _options(self)
        odd = [
            word for each in self._given if (word := each.partition("=")[0]).startswith("--") and word not in options
        ]
        return f"; unknown option: {odd[0]}{meant(odd[0], options)}" if odd else ""


def _options(command: argparse.ArgumentParser) -> list[str]:
    return [option for action in command._actions for option in action.option_strings]


def above_zero(text: str) -> float:
    """A type of arguments: a number above 0."""
    if not _number(text) > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return float(text)


def not_negative(text: str) -> float:
    """A type of arguments: a number of 0 or more."""
    if not _number(text) >= 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return float(text)


def at_least_one(text: str) -> int:
    """A type of arguments: a whole number of 1 or more."""
    if not _number(text) >= 1 or not float(text).is_integer():
        raise argparse.ArgumentTypeError("must be a whole number of 1 or more")
    return int(float(text))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
