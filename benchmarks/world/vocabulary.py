"""Every word that questions and answers may use, beside drawn digits and codes.

What is drawn is told in digits and letters ("42", "kqz"); what is counted is told in words ("three", "row two").
Everything is in lower case in dialogues and in upper case in pictures. Codes have no vowels, so none begins with a
word of the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "black")
SIZES = ("small", "large")
MOTIONS = ("left", "right", "up", "down", "nowhere")
PLACES = (
    *("top left", "top centre", "top right"),
    *("middle left", "middle centre", "middle right"),
    *("bottom left", "bottom centre", "bottom right"),
)
CARDINALS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
COLUMN_NAMES = {  # of a page, by how many it has
    1: ("the page",),
    2: ("the left column", "the right column"),
    3: ("the left column", "the middle column", "the right column"),
}

# What a page's rows are about, at most six letters so that word and value fit one tile.
ROW_WORDS = (
    *("apple", "bacon", "beans", "bread", "butter", "cake", "candle", "carrot", "cheese", "coffee", "corn", "cream"),
    *("eggs", "fish", "flour", "fruit", "garlic", "ginger", "grapes", "ham", "honey", "ice", "jam", "juice"),
    *("lamp", "lemon", "mango", "melon", "milk", "nuts", "oil", "olives", "onion", "orange", "paper", "peach"),
    *("pears", "pepper", "pizza", "potato", "rice", "salad", "salt", "sauce", "soap", "soup", "sugar", "tea"),
)
TITLES = ("basket", "bill", "cargo", "garden", "kiosk", "market", "menu", "order", "pantry", "shop", "stock", "wares")
REFERENCE = "ref"  # stands before the code in a page's last line

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
CODE_LETTERS = 3


def vocabulary(phrases: Iterable[str]) -> tuple[str, ...]:
    """All words of these phrases and of the tables above, sorted; digits and codes are spelt by their characters."""
    names = [name for row in COLUMN_NAMES.values() for name in row]
    tables = (SHAPES, COLOURS, SIZES, MOTIONS, PLACES, CARDINALS, ROW_WORDS, TITLES, names, phrases)
    found: set[str] = set()
    for table in tables:
        for text in table:
            found.update(words_of(re.sub(r"\{\w+\}", " ", text)))
    return tuple(sorted(found))


def words_of(text: str) -> list[str]:
    """The words of a question or an answer in order, without punctuation."""
    return re.findall(r"[a-z0-9]+", text)
