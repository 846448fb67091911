"""Rows for tasks of every kind, on the words that the tiny tokenizer of `helpers.tiny` knows."""

import json
import random
from pathlib import Path

from helpers.tiny import COLORS, WORDS

PETS = ["cat", "dog", "bird"]
TAGS = ["I-color", "I-pet", "O"]


def save_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def tagged_sentences(seed: int, count: int) -> list[dict]:
    """Colors and pets are entities, neighbors of one kind together, in the first CoNLL task's way (IOB1)."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(3, 9))
        tags = ["I-color" if word in COLORS else "I-pet" if word in PETS else "O" for word in words]
        rows.append({"tokens": words, "tags": tags})
    return rows


def questions(seed: int, count: int, num_choices: int = 3) -> list[dict]:
    """The right choice is the one with a color in it."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        choices = [f"{draw.choice(PETS)} {draw.choice(['one', 'two', 'three'])}" for _ in range(num_choices)]
        answer = draw.randrange(num_choices)
        choices[answer] = f"{draw.choice(COLORS)} {draw.choice(['one', 'two', 'three'])}"
        rows.append({"question": " ".join(draw.choices(WORDS, k=3)), "choices": choices, "answer": answer})
    return rows


def texts_with_a_color(seed: int, count: int) -> list[dict]:
    """The label is the only color in the text."""
    draw = random.Random(seed)
    others = [word for word in WORDS if word not in COLORS]
    rows = []
    for _ in range(count):
        color = draw.choice(COLORS)
        words = [color, *draw.choices(others, k=3)]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "color": color})
    return rows


def texts_with_pets(seed: int, count: int) -> list[dict]:
    """The labels are the pets in the text, and the number is how many colors it has."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(2, 8))
        pets = [pet for pet in PETS if pet in words]
        rows.append({"text": " ".join(words), "pets": pets, "number": sum(word in COLORS for word in words)})
    return rows
