"""Results for people: tables, the model card, the report of a conversion. Pure text; runs without torch.

* `table`: a table as data, printed in a terminal or as Markdown.
* `comparison`: what an evaluation found, base beside quantized.
* `conversion`: what a conversion did, layer by layer, from the report in a manifest.
* `card`: the README.md of a packed checkpoint.
"""

from ernieq.report.card import card_for_hub, model_card
from ernieq.report.comparison import comparison_table
from ernieq.report.conversion import LayerRow, StarvedExpert, conversion_html, conversion_markdown, layer_rows
from ernieq.report.table import Section, Table

__all__ = [
    "LayerRow",
    "Section",
    "StarvedExpert",
    "Table",
    "card_for_hub",
    "comparison_table",
    "conversion_html",
    "conversion_markdown",
    "layer_rows",
    "model_card",
]
