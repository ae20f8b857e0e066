"""Compress source code by context mixing: 24 % smaller than bzip2 on train_gpt.py, and slow.

After PAQ (Mahoney 2005). A character is 7 bits. Each bit is predicted by the bits that followed
the same contexts before (the last characters, the word, the bracket it stands in, ...); the
predictions are mixed in the logistic domain by weights that learn, and the bit is coded by how
likely that makes it. Whole numbers throughout: the same text on every machine and Python.

Packed files carry this file's decoder (all above `encode`), so it is written to be short; it is
also the text that the model reads first. `verify` knows this decoder only: who changes it makes the
record folders of this repository again.
"""

import itertools
import math
from operator import mul

DIGITS = bytes({*range(256)} - {*b'\0\n\r"\\'})  # what can stand in a string literal as it is
INPUTS = 14  # contexts, and the match


def is_word(text):
    """Whether text is a name, a number or part of one."""
    return ("a" + text).isidentifier()


class Reader:
    """What has been read, as contexts of the next character."""

    text, words, symbols, line, quote, match = " " * 8, [""] * 3, "", "", "", 0

    def __init__(self):
        self.opened, self.seen = [("", "")], {}

    def contexts(self):
        """All contexts; the last character comes first."""
        text, (word, _, third), (bracket, before) = self.text, self.words, self.opened[-1]
        last = text[-1]
        return (last, "", text[-2:], text[-3:], text[-4:], text[-5:], text[-7:], word,
                self.symbols, (third, word), (self.line, self.symbols, word), (before, word),
                (bracket, self.quote, last))

    def read(self, character):
        """Take in the next character; `match` is where it followed the same five before, or 0."""
        word, *names = self.words
        if is_word(character):
            self.words = [word + character if is_word(word) else character, *names]
        else:
            self.words = [character, *([word] * is_word(word) + names)[:2]]
            self.symbols = (self.symbols + character.strip(" "))[-2:]
        if character in "([{":
            self.opened.append((character, self.words[1]))
        if character in ")]}":
            self.opened[1:] = self.opened[1:-1]
        if character in "\"'":
            self.quote = "" if self.quote == character else self.quote or character
        self.line = self.line or character.strip()
        if character == "\n":
            self.line, self.quote, self.opened[1:] = "", "", []
        self.text += character
        self.match = self.match + 1 if self.match else self.seen.get(self.text[-5:], 0)
        self.seen[self.text[-5:]] = len(self.text)


def model(choose, size):
    """Text of `size` characters whose bits come from choose(probability of a 1, of 65536)."""
    odds = [2048, *range(1, 4096)]  # of 4096; 0 is what has not been seen
    stretch = [round(256 * math.log(p / (4096 - p))) for p in odds for _ in range(8)]
    step = [[min(max(p + int((4096 * bit - p) / (n + 1.1)), 8), 4088) << 3 | min(n + 1, 7)
             for p in odds for n in range(8)] for bit in (0, 1)]  # of states: 8 p + bits seen, to 7
    squash = [round(1 + 65534 / (1 + math.exp(-x / 256))) for x in range(-3072, 3073)]
    reader, tables, weights, trusts, length = Reader(), {}, {}, {}, 0
    for _ in range(size):
        contexts, node = reader.contexts(), 1
        found = [tables.setdefault(item, {}) for item in enumerate(contexts)]
        first = weights.setdefault(contexts[0], [4500] * INPUTS)
        guess = ord(reader.text[reader.match]) | 128
        length = min(length + 1, 31) if reader.match else 0
        for place in range(7):
            agrees = length if guess >> 7 - place == node else 0
            states = [table.get(node, 0) for table in found]
            inputs = [stretch[state] for state in states]
            expected, trust = guess >> 6 - place & 1, trusts.get(agrees, 23000)
            inputs.append(stretch[trust] * (2 * expected - 1) if agrees else 0)
            second = weights.setdefault((node, agrees // 2), [4500] * INPUTS)
            x = sum(map(mul, inputs, first)) + sum(map(mul, inputs, second)) >> 16
            p = squash[min(max(x, -3072), 3072) + 3072]
            bit = choose(p)
            error = (bit << 16) - p
            if abs(error) > 600:
                for w in first, second:
                    w[:] = [a + (error * x + 65536 >> 17) for a, x in zip(w, inputs, strict=True)]
            change = step[bit]
            for table, state in zip(found, states, strict=True):
                table[node] = change[state]
            if agrees:
                trusts[agrees] = trust + ((bit == expected) * 32700 - trust) // 50
                length *= bit == expected
            node = 2 * node + bit
        reader.match = length and reader.match
        reader.read(chr(node & 127))
    return reader.text[8:]


def bits_of(text):
    """The bits of a text, 7 for each character."""
    return iter([ord(character) >> place & 1 for character in text for place in range(6, -1, -1)])


def decode(data, size, known):
    """The text of `size` characters that `encode` made `data` of, with the same known text."""
    heard = bits_of(known)
    digits = itertools.chain(map(DIGITS.index, data), itertools.repeat(0))
    span, code = 1, 0

    def choose(p):
        nonlocal span, code
        for bit in heard:
            return bit
        while span < 1 << 32:
            span, code = span * 251, code * 251 + next(digits)
        part = span * p >> 16
        bit = code < part
        code, span = (code, part) if bit else (code - part, span - part)
        return bit

    return model(choose, len(known) + size)[len(known) :]


def encode(text: str, known: str) -> bytes:
    """Digits to the base 251 of a number in the interval that arithmetic coding gives the text.

    `known` is read first, and not coded: what it has in common with the text need not be said.
    """
    heard, bits = bits_of(known), bits_of(text)
    low, span, count = 0, 1, 0

    def choose(p: int) -> int:
        nonlocal low, span, count
        for bit in heard:
            return bit
        while span < 1 << 32:
            low, span, count = low * 251, span * 251, count + 1
        part, bit = span * p >> 16, next(bits)
        low, span = (low, part) if bit else (low + part, span - part)
        return bit

    model(choose, len(known) + len(text))
    number, digits = low + span - 1, []
    while count and number - number % 251 >= low:  # a digit that need not be said: decode adds 0s
        number, low, count = number // 251, -(-low // 251), count - 1
    for _ in range(count):
        number, digit = divmod(number, 251)
        digits.append(DIGITS[digit])
    return bytes(reversed(digits))
