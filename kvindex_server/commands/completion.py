"""`kvindex completion`: a script that completes commands, options and their values in bash, zsh or fish."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvindex_server.commands import screen

SHELLS = ("bash", "zsh", "fish")
_FILES = re.compile(r"\b(FILE|DIR)\b")

BASH = """_kvindex() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words= files=
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}:$before" in
{values}
  esac
  case "${{COMP_WORDS[1]}}" in
{options}
  esac
  case "$files$word" in
    1-*) ;;
    1*) COMPREPLY=($(compgen -f -- "$word")) ;;
  esac
  COMPREPLY+=($(compgen -W "$words" -- "$word"))
}}
complete -o filenames -F _kvindex kvindex"""

ZSH = """#compdef kvindex
_kvindex() {{
  local -a commands=(
{commands}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
{cases}
  esac
}}
compdef _kvindex kvindex"""


@dataclass(frozen=True)
class _Word:
    """An option, or with an empty name what may stand without one."""

    name: str
    help: str
    takes: str
    """`nothing`, `file`, `value`, or `choice` of `choices`."""
    choices: tuple[str, ...] = ()
    again: bool = False


@dataclass(frozen=True)
class _Command:
    help: str
    words: tuple[_Word, ...]

    @property
    def options(self) -> list[_Word]:
        return [each for each in self.words if each.name]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=SHELLS)


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """To be sourced: `source <(kvindex completion bash)`."""
    commands = dict(_commands(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](commands)


def write(shell: str, parser: argparse.ArgumentParser) -> int:
    """The script on stdout."""
    screen.write(script(shell, parser))
    return 0


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, _Command]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {each.dest: each.help or "" for each in action._choices_actions}
            for name, command in action.choices.items():
                yield name, _Command(told.get(name, ""), tuple(map(_word, command._actions)))


def _word(action: argparse.Action) -> _Word:
    name = next((each for each in action.option_strings if each.startswith("--")), "")
    told = (action.help or "").replace("%%", "%")
    again = isinstance(action, argparse._AppendAction)
    # Of a value that the settings' schema judges, the metavar has the choices.
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    choices = tuple(map(str, action.choices or ())) or (tuple(metavar.split("|")) if "|" in metavar else ())
    if choices:
        return _Word(name, told, "choice", choices, again)
    if action.nargs == 0:
        return _Word(name, told, "nothing")
    is_file = action.type is Path or _FILES.search(f"{metavar} {told}")
    return _Word(name, told, "file" if is_file else "value", (), again)


def _bash(commands: dict[str, _Command]) -> str:
    values, options = [], []
    for name, command in commands.items():
        for kind, reply in (("file", '$(compgen -f -- "$word")'), ("value", "")):
            named = "|".join(f"{name}:{each.name}" for each in command.options if each.takes == kind)
            if named:
                values.append(f"    {named}) COMPREPLY=({reply}); return ;;")
        for each in command.options:
            if each.takes == "choice":
                reply = f'$(compgen -W "{" ".join(each.choices)}" -- "$word")'
                values.append(f"    {name}:{each.name}) COMPREPLY=({reply}); return ;;")
        free = [choice for each in command.words if not each.name for choice in each.choices]
        words = " ".join([*(each.name for each in command.options), *free])
        files = " files=1" if any(each.takes == "file" and not each.name for each in command.words) else ""
        options.append(f'    {name}) words="{words}"{files} ;;')
    return BASH.format(commands=" ".join(commands), values="\n".join(values), options="\n".join(options))


def _zsh(commands: dict[str, _Command]) -> str:
    named = "\n".join(f"    {_quoted(f'{name}:{command.help}')}" for name, command in commands.items())
    cases = []
    for name, command in commands.items():
        specs = " ".join(_quoted(_zsh_spec(each)) for each in command.words)
        cases.append(f"    {name}) _arguments {specs} ;;")
    return ZSH.format(commands=named, cases="\n".join(cases))


def _zsh_spec(word: _Word) -> str:
    values = {"file": "_files", "choice": f"({' '.join(word.choices)})", "value": " ", "nothing": ""}[word.takes]
    if not word.name:
        return f":word:{values}"
    told = word.help.replace("[", "(").replace("]", ")").replace(":", "\\:")
    spec = f"{'*' if word.again else ''}{word.name}[{told}]"
    return spec if word.takes == "nothing" else f"{spec}:value:{values}"


def _fish(commands: dict[str, _Command]) -> str:
    lines = ["complete -c kvindex -f"]
    for name, command in commands.items():
        lines.append(f"complete -c kvindex -n __fish_use_subcommand -a {name} -d {_quoted(command.help)}")
        here = f"complete -c kvindex -n '__fish_seen_subcommand_from {name}'"
        for each in command.words:
            values = {
                "nothing": "",
                "file": " -r -F" if each.name else " -F",
                "choice": f" -x -a '{' '.join(each.choices)}'",
                "value": " -x",
            }[each.takes]
            option = f" -l {each.name.removeprefix('--')} -d {_quoted(each.help)}" if each.name else ""
            lines.append(f"{here}{option}{values}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Of a shell, on one line. A single quote becomes an apostrophe: each shell escapes it in its own way."""
    return "'" + " ".join(text.replace("'", "’").split()) + "'"
