"""The command line: ``ernieq COMMAND``, one file per command.

A command's file is imported only when that command runs, so that ``ernieq --help`` answers at once, without
torch. A command prints; what it prints was computed by the packages below.

To add a command: write ``ernieq/cli/<name>.py`` with a click command called ``command``, and list it here.
"""

from __future__ import annotations

import os

import click

import ernieq
from ernieq.cli.group import CommandEntry, CommandSection, ErnieqGroup

SECTIONS = (
    CommandSection(
        "Make",
        (
            CommandEntry("quantize", "Write a checkpoint at 1.5 to 6 bits per weight."),
            CommandEntry("calibrate", "Run texts through a model and report what its experts saw."),
            CommandEntry("sample-text", "Let the model write text to calibrate on."),
            CommandEntry("export", "Write the decoded weights as an ordinary checkpoint."),
            CommandEntry("import-wint2", "Read Baidu's 2-bit files of FastDeploy."),
        ),
    ),
    CommandSection(
        "Check",
        (
            CommandEntry("eval-ppl", "Measure perplexity, and the divergence from the base model."),
            CommandEntry("inspect", "Show what is inside: bits, bytes and codes per group."),
            CommandEntry("verify", "Check hashes, shapes, scales and coverage."),
            CommandEntry("reproduce", "Run the conversion again and compare the bytes."),
        ),
    ),
    CommandSection(
        "Use",
        (
            CommandEntry("generate", "Complete prompts."),
            CommandEntry("push", "Upload a packed checkpoint to the Hugging Face hub."),
            CommandEntry("bench", "Measure the speed of prompts and of what follows them."),
        ),
    ),
    CommandSection(
        "Set up",
        (
            CommandEntry("env", "Say what this machine has and which backends can run on it."),
            CommandEntry("completion", "Print a script that completes commands in a shell."),
        ),
    ),
)


# Torch's idle threads would spin on the processors that the trellis search, which has threads of its own, could
# use; read once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@click.command(cls=ErnieqGroup, sections=SECTIONS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ernieq.__version__, prog_name="ernieq")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Quantize ERNIE 4.5 language models to 1.5 to 6 bits, check them, run them.

    Every command explains itself: ernieq COMMAND --help. With no model named, quantize takes the small one
    that comes with this package.
    Wherever a model is asked for, its directory or its Hugging Face id will do.

    \b
    Example:
      ernieq quantize --bits 2
      ernieq eval-ppl ernieq-nano-2bit
      ernieq generate ernieq-nano-2bit "The old house stood"
    """
