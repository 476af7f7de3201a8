"""``ernieq completion``: the script that makes a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_PROGRAM = "ernieq"
_VARIABLE = "_ERNIEQ_COMPLETE"  # click's own name for it: what the script sets when it asks for completions


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print a script that makes SHELL complete the commands and options of ernieq.

    \b
    Example:
      ernieq completion bash >> ~/.bashrc
      ernieq completion zsh >> ~/.zshrc
      ernieq completion fish > ~/.config/fish/completions/ernieq.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, "click knows all three"
    click.echo(kind(click.get_current_context().find_root().command, {}, _PROGRAM, _VARIABLE).source())


completion = command
