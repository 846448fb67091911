"""Scores in a model card, as people and hubs read them."""

from pathlib import Path

from huggingface_hub import ModelCard

from lightning_drm.evaluation import Comparison, Score
from lightning_drm.fusion import Recipe, model_card
from lightning_drm.kinds import MetricInfo
from lightning_drm.merging import DRM
from lightning_drm.training.merged_card import add_scores

ACCURACY, PERPLEXITY = MetricInfo("accuracy"), MetricInfo("perplexity", higher_is_better=False, is_fraction=False)


def comparison(merged: float) -> Comparison:
    base = {"topic": None, "story": Score(9.0, PERPLEXITY)}
    individual = {"topic": Score(0.8, ACCURACY), "story": Score(3.0, PERPLEXITY)}
    of_merged = {"topic": Score(merged, ACCURACY), "story": Score(4.0, PERPLEXITY)}
    return Comparison(["topic", "story"], base, individual, of_merged, {"class_path": "lightning_drm.DRM"})


def test_scores_are_in_the_metadata_and_in_a_table(tmp_path: Path):
    path = tmp_path / "README.md"
    columns = {"topic": {"parameters with a delta": 3}, "story": {"parameters with a delta": 3}}
    before = model_card(Recipe(DRM()), columns, base="org/base", base_fingerprint="12", license="mit", loading="load()")
    path.write_text(before)
    add_scores(path, comparison(0.5))
    add_scores(path, comparison(0.6))  # measured again
    card = ModelCard.load(path)
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("topic", "accuracy", 0.6),
        ("story", "perplexity", 4.0),
    ]
    metadata = card.data.to_dict()
    assert (metadata["base_model"], metadata["base_model_relation"], metadata["license"]) == (
        "org/base",
        "merge",
        "mit",
    )
    assert card.text.count("## Scores") == 1
    assert "| topic | accuracy |  | 0.800 | 0.600 | 0.750 |" in card.text.splitlines()
    assert "| story | perplexity | 9.000 | 3.000 | 4.000 | 0.750 |" in card.text.splitlines()
    text = before.partition("\n---\n")[2].strip()
    assert card.text.strip().startswith(text), "nothing of the card is lost"
