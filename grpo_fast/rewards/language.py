"""Language consistency by script, without a model or a dictionary; it cannot distinguish languages of one script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from grpo_fast.rewards.common import Completion, check_same_length, reasoning_of, text_of

__all__ = ["LanguageConsistencyReward", "words_by_script"]

# Unicode's script property is not in the standard library, but the name of every letter begins with its script.
_SCRIPTS = {"CJK": "Han"} | {
    name.upper(): name
    for name in re.findall(
        r"\w+",
        """Arabic Armenian Bengali Bopomofo Cyrillic Devanagari Ethiopic Georgian Greek Gujarati Gurmukhi Hangul Hebrew Hiragana Kannada
        Katakana Khmer Lao Latin Malayalam Mongolian Myanmar Oriya Sinhala Tamil Telugu Thai Tibetan""",
    )
}
_UNSPACED = {"Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"}  # no white space between words
# Not language: what is between dollar signs or \( \), \[ \], LaTeX commands, code between backticks, links, tags.
_NEUTRAL = re.compile(
    r"\$\$.*?\$\$|\$[^$\n]*\$|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]|```.*?(?:```|\Z)|`[^`\n]*`|\\[A-Za-z]+|https?://\S+|</?\w+>",
    re.DOTALL,
)


@dataclass(frozen=True)
class LanguageConsistencyReward:
    """The share, from 0 to 1, of the reasoning's words in the target script (DeepSeek-R1, arXiv:2501.12948, equation 7).

    The paper counts the words of the target language; a rule can only detect the script. Formulas, code and links are not counted (see
    `words_by_script`). None if no word remains. R1 reports a small loss of accuracy and more readable reasoning.

    Args:
        script: the name of a Unicode script ("Latin", "Han", "Cyrillic", ...), or a tuple of names: ``("Han", "Hiragana", "Katakana")``
            for Japanese.

    Example:
        >>> LanguageConsistencyReward("Latin")(["?"] * 3, ["so three 加 four", "итак 7", "$x = 7$"])
        [0.75, 0.0, None]
    """

    script: str | tuple[str, ...] = "Latin"
    __name__ = "language_consistency_reward"

    def __post_init__(self) -> None:
        scripts = (self.script,) if isinstance(self.script, str) else tuple(self.script)
        known = sorted(set(_SCRIPTS.values()))
        for script in scripts:
            if script not in known:
                raise ValueError(f"LanguageConsistencyReward: script is {script!r}; expected one or more of {', '.join(known)}.")
        if not scripts:
            raise ValueError("LanguageConsistencyReward: script is empty; expected at least one name, 'Latin' for instance.")
        if not isinstance(self.script, str):
            object.__setattr__(self, "script", scripts)

    def __call__(
        self,
        prompts: Sequence[Completion],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: object,
    ) -> list[float | None]:
        check_same_length(self.__name__, prompts=prompts, completions=completions)
        target = {self.script} if isinstance(self.script, str) else set(self.script)
        result: list[float | None] = []
        for completion in completions:
            words = words_by_script(reasoning_of(text_of(completion)))
            total = sum(words.values())
            result.append(sum(count for script, count in words.items() if script in target) / total if total else None)
        return result


def words_by_script(text: str) -> dict[str, int]:
    """The number of words of each script in a text. A word is a run of letters of one script, or one letter of a script without spaces.

    Not counted: digits, symbols, letters of unknown scripts, and parts that are not language: ``$…$``, ``\\(…\\)``, ``\\[…\\]``,
    LaTeX commands, code between backticks, links and tags.

    Example:
        >>> words_by_script("the sum 是七 $x$")
        {'Latin': 2, 'Han': 2}
    """
    counts: dict[str, int] = {}
    current: str | None = None
    for character in _NEUTRAL.sub(" ", text):
        category = unicodedata.category(character)
        if category[0] == "M" or character in "'’":  # an accent, a vowel sign, an apostrophe: the word goes on
            continue
        script = _script(character) if category[0] == "L" else None
        if script is not None and (script != current or script in _UNSPACED):
            counts[script] = counts.get(script, 0) + 1
        current = script
    return counts


@lru_cache(maxsize=8192)
def _script(letter: str) -> str | None:
    name = unicodedata.name(letter, "").removeprefix("HALFWIDTH ").removeprefix("FULLWIDTH ")
    return _SCRIPTS.get(name.partition(" ")[0])
