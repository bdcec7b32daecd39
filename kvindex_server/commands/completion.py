"""`kvindex completion`: a script that completes commands and options in bash, zsh or fish."""

import argparse
from collections.abc import Iterator

from kvindex_server.commands import screen

SHELLS = ("bash", "zsh", "fish")

BASH = """_kvindex() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  else
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "$word" in
      -*) ;;
      *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
  fi
  COMPREPLY+=($(compgen -W "$words" -- "$word"))
}}
complete -o filenames -F _kvindex kvindex"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=SHELLS)


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """To be sourced: `source <(kvindex completion bash)`."""
    commands = dict(_commands(parser))
    if shell == "fish":
        lines = ["complete -c kvindex -f -n __fish_use_subcommand -a '" + " ".join(commands) + "'"]
        for command, options in commands.items():
            lines += [
                f"complete -c kvindex -n '__fish_seen_subcommand_from {command}' -l {option.removeprefix('--')}"
                for option in options
            ]
        return "\n".join(lines)
    cases = "\n".join(f'      {name}) words="{" ".join(options)}" ;;' for name, options in commands.items())
    bash = BASH.format(commands=" ".join(commands), cases=cases)
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"


def write(shell: str, parser: argparse.ArgumentParser) -> int:
    """The script on stdout."""
    screen.write(script(shell, parser))
    return 0


def _commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                options = [each for own in command._actions for each in own.option_strings if each.startswith("--")]
                yield name, [*options, *SHELLS] if name == "completion" else options
