"""`qmix completion`: the script that makes a shell complete commands, options, models and stores."""

from __future__ import annotations

import click

from qmix.commands.shared import out

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    For bash, put `eval "$(qmix completion bash)"` into ~/.bashrc; for zsh, `eval "$(qmix completion zsh)"` into
    ~/.zshrc; for fish, `qmix completion fish > ~/.config/fish/completions/qmix.fish`.
    """
    from click.shell_completion import get_completion_class

    from qmix.commands import Commands

    kind = get_completion_class(shell)
    assert kind is not None
    out(kind(Commands("qmix"), {}, "qmix", "_QMIX_COMPLETE").source() + "\n")
