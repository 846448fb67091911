"""What a fit of coefficients has found, kept so that it need not be learned again, and told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from lightning_drm.fusion import Recipe
from lightning_drm.fusion.recipe import class_path
from lightning_drm.tuning.learned_figures import coefficients_finding, loss_finding
from lightning_drm.tuning.learning import Check
from lightning_drm.tuning.outcome import Outcome
from lightning_drm.tuning.parts import recipe_with
from lightning_drm.tuning.settings import GradientSettings
from lightning_drm.tuning.space import setting_title
from lightning_drm.tuning.trial import Trial


@dataclass(frozen=True)
class Learned:
    """Coefficients and how they were found.

    Attributes:
        coefficients: By parameter's name, one for each task: those whose check has the lowest loss.
        tasks: The tasks.
        has_part: By parameter's name, for each task whether it adds anything there, so that λ matters.
        checks: All checks of the fit.
        num_samples: By task, how many samples it learned from, and how many it was judged on.
    """

    coefficients: Mapping[str, Sequence[float]]
    tasks: Sequence[str]
    has_part: Mapping[str, Sequence[bool]]
    checks: Sequence[Check]
    num_samples: Mapping[str, tuple[int, int]]

    @property
    def best(self) -> Check:
        """The check with the lowest loss, the first one of equal ones."""
        return min(self.checks, key=lambda check: check.loss)

    def recipe(self, configured: Recipe) -> Recipe:
        """The recipe with the learned coefficients.

        Args:
            configured: The recipe that they were learned for.
        """
        return recipe_with(configured, self.coefficients, self.tasks)

    def outcome(self, settings: GradientSettings, chosen: Trial, untuned: Trial) -> Outcome:
        """What is reported.

        Args:
            settings: How they were learned.
            chosen: The learned recipe on all validation samples.
            untuned: The configured one on the same samples.
        """
        first, best, last = self.checks[0], self.best, self.checks[-1]
        by = "the tasks' own loss" if settings.objective == "labels" else "the entropy of the predictions"
        where = f" and each of {len(self.coefficients)} parameters" if settings.by_parameter else ""
        title, before = setting_title(chosen.recipe), setting_title(untuned.recipe)
        sentence = (
            f"Learned a coefficient of each task{where} in {last.step} steps, by {by}. On the half of the validation "
            f"samples that no step sees, it is {first.loss:.4g} at the start and lowest after {best.step} steps, "
            f"{best.loss:.4g}. "
            f"On all validation samples, {title} reaches {100 * chosen.reached:.1f} % of the finetunes' own scores; as "
            f"configured ({before}) it is {100 * untuned.reached:.1f} %."
        )
        about = {
            "options": {"search": "gradient", "methods": [class_path(chosen.recipe.method)], **settings.options},
            "num_steps": last.step,
            "best_step": best.step,
            "loss": {"start": dict(first.losses), "best": dict(best.losses)},
            "num_samples": {task: list(numbers) for task, numbers in self.num_samples.items()},
        }
        figures = [
            coefficients_finding(self.coefficients, self.has_part, self.tasks, title),
            loss_finding(self.checks, best, self.tasks, settings.objective),
        ]
        return Outcome(chosen, untuned, [chosen, untuned], sentence, figures, about)

    def stored(self) -> dict[str, Any]:
        """The same as plain values."""
        return {
            "coefficients": {name: list(row) for name, row in self.coefficients.items()},
            "tasks": list(self.tasks),
            "has_part": {name: list(row) for name, row in self.has_part.items()},
            "checks": [
                {"step": check.step, "losses": dict(check.losses), "learned": check.learned} for check in self.checks
            ],
            "num_samples": {task: list(numbers) for task, numbers in self.num_samples.items()},
        }

    @classmethod
    def of_stored(cls, stored: Mapping[str, Any]) -> Self:
        """What `stored` gave.

        Args:
            stored: The plain values.
        """
        checks = [Check(check["step"], check["losses"], check["learned"]) for check in stored["checks"]]
        numbers = {task: (first, second) for task, (first, second) in stored["num_samples"].items()}
        return cls(stored["coefficients"], stored["tasks"], stored["has_part"], checks, numbers)
