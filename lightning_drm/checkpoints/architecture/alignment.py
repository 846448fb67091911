"""Finding one parameter under two names.

The same weight is ``encoder.layer.0…`` in a bare encoder, ``bert.encoder.layer.0…`` in a classifier, and
``model.bert.encoder.layer.0…`` in a LightningModule's checkpoint. One prefix to take off and one to put on explain all
of these. The pair that explains the most names wins; of several such pairs, the shortest.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_WRAPPED = 0.2  # a wrapper's prefix stands before at least this fraction of all names


@dataclass(frozen=True)
class Alignment:
    """From one model's names to another's.

    Attributes:
        strip: Prefix to take off.
        add: Prefix to put on.
        num_matches: How many names it explains.
    """

    strip: str = ""
    add: str = ""
    num_matches: int = 0

    @classmethod
    def between(cls, names: Iterable[str], targets: Iterable[str]) -> "Alignment":
        """Finds the two prefixes.

        Args:
            names: One model's names.
            targets: The other model's names.

        Example:
            >>> Alignment.between(["model.a.weight", "model.b.weight", "head.weight"], ["a.weight", "b.weight"])
            Alignment(strip='model.', add='', num_matches=2)
        """
        names, targets = list(names), set(targets)
        best = cls()
        for strip in _prefixes(names):
            rest = [name[len(strip) :] for name in names if name.startswith(strip)]
            for add in _prefixes(targets):
                count = sum(add + name in targets for name in rest)
                if (count, -len(strip + add)) > (best.num_matches, -len(best.strip + best.add)):
                    best = cls(strip, add, count)
        return best

    def covers(self, name: str) -> bool:
        """Whether a name is in the part of the model that the other model has, too."""
        return name.startswith(self.strip)

    def __call__(self, name: str) -> str:
        """The other model's name for it; a name that is not covered stays as it is."""
        return self.add + name[len(self.strip) :] if self.covers(name) else name


def _prefixes(names: Iterable[str]) -> list[str]:
    names = list(names)
    counts = Counter(name[: i + 1] for name in names for i, letter in enumerate(name) if letter == ".")
    return ["", *(prefix for prefix, count in counts.items() if count >= _WRAPPED * len(names))]
