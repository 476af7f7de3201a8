"""``python -m ernieq.cli`` is ``ernieq``."""

from ernieq.cli import main

main(prog_name="ernieq")
