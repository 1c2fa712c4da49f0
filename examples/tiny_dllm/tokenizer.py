"""Character tokenizer of the tiny model: a fixed vocabulary, padded to a round size."""

import string
from collections.abc import Iterable, Sequence

SPECIAL = ("<pad>", "<eos>", "<mask>")
CHARACTERS = " " + string.digits + string.ascii_letters + ".,:?'+-*="


class CharTokenizer:
    """Text to token ids and back, one character a token.

    Ids 0, 1, 2 are padding, end of text and mask; the characters follow in the order of
    `CHARACTERS`. Ids from the last character to `vocab_size` are never produced.
    """

    pad_id = 0
    eos_id = 1
    mask_id = 2
    vocab_size = 96

    def __init__(self, characters: str = CHARACTERS) -> None:
        if len(set(characters)) != len(characters):
            raise ValueError("characters: expected each character once")
        if len(SPECIAL) + len(characters) > self.vocab_size:
            raise ValueError(
                f"characters: expected at most {self.vocab_size - len(SPECIAL)}, "
                f"got {len(characters)}"
            )
        self.characters = characters
        self._id = {char: index for index, char in enumerate(characters, len(SPECIAL))}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`.

        Raises:
            ValueError: a character outside the vocabulary.
        """
        try:
            return [self._id[char] for char in text]
        except KeyError as error:
            raise ValueError(
                f"text: character {error.args[0]!r} is not in the vocabulary"
            ) from None

    def decode(self, ids: Iterable[int], *, stop_at_eos: bool = True) -> str:
        """The text of `ids`, up to the first end of text; a mask reads `_`, padding nothing."""
        out: list[str] = []
        for token in ids:
            if token == self.eos_id and stop_at_eos:
                break
            out.append(self.piece(token))
        return "".join(out)

    def piece(self, token: int) -> str:
        """The text of one token: empty for padding and end of text, `_` for a mask, and the
        replacement character for an id that no text encodes to."""
        if token in (self.pad_id, self.eos_id):
            return ""
        if token == self.mask_id:
            return "_"
        index = token - len(SPECIAL)
        return (
            self.characters[index]
            if 0 <= index < len(self.characters)
            else "\N{REPLACEMENT CHARACTER}"
        )

    def vocabulary(self) -> Sequence[str]:
        """Every token's name in id order, as `config.json` records it."""
        return [*SPECIAL, *self.characters]
