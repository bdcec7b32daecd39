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

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As of argparse; what is unknown is an error of the command it was given to."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = self.commands().get(getattr(found, "command", ""), self)
            options = [option for action in command._actions for option in action.option_strings]
            first = next((each for each in unknown if each.startswith("-")), unknown[0])
            given = first.partition("=")[0]
            command.error(
                f"unknown {'option' if first.startswith('-') else 'argument'}: {given}{meant(given, options)}"
            )
        return found

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
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: {message}\n")
