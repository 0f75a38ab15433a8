"""Blocks of a Markdown file that a command writes, each between two comments."""

import re

from hires.errors import HiresError


def with_block(text: str, name: str, body: str) -> str:
    """`text` with `body`, whole lines, between its lines <!-- name: … --> and <!-- /name -->."""
    block = re.compile(rf"(<!-- {name}: .*? -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
    if not block.search(text):
        raise HiresError(f"no lines <!-- {name}: … --> and <!-- /{name} --> in this order: put them back")
    return block.sub(lambda found: found[1] + body, text)
