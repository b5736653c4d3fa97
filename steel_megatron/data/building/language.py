"""Chinese, English or something else: by counting letters of scripts.

A Chinese-centric mixture asks one thing of a conversation, and scripts answer it exactly and at once, for texts of any
length and without a model. The price: other languages in Latin letters count as English.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from steel_megatron.data.reading.conversations import Turn

Language = Literal["zh", "en", "other"]
ZH_SHARE = 0.2
"""A conversation with at least this share of Chinese characters among its letters is Chinese: a Latin word has several
letters."""
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_CHINESE, _LATIN = re.compile(r"[\u3400-\u9fff]+"), re.compile(r"[A-Za-z\u00c0-\u024f]+")
_LETTERS = re.compile(r"[^\W\d_]+")


def language_of(turns: Sequence[Turn]) -> Language:
    """The language of a conversation, apart from its blocks of code and what the system says.

    Args:
        turns: the conversation.

    Returns:
        ``other`` where most letters are of another script (kana in Japanese, say), or there are none.
    """
    text = _CODE.sub("", "\n".join(turn.content for turn in turns if turn.role != "system"))
    letters, chinese, latin = (sum(map(len, script.findall(text))) for script in (_LETTERS, _CHINESE, _LATIN))
    if 2 * (letters - chinese - latin) >= letters:
        return "other"
    return "zh" if chinese >= ZH_SHARE * letters else "en"
