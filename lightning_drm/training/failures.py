"""Tasks that could not be finetuned, while the others were: what is said of them at the end."""

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_drm.storage import WriteError

_MISTAKES = (ValueError, OSError, MisconfigurationException)


class Failures:
    """Takes note of what kept tasks from being finetuned.

    Args:
        keep_going: Whether the other tasks are still finetuned; otherwise the first failure ends the run.
    """

    def __init__(self, keep_going: bool) -> None:
        self._keep_going = keep_going
        self._errors: dict[str, Exception] = {}

    @contextmanager
    def of(self, task: str) -> Iterator[None]:
        """While it lasts, errors are this task's.

        Args:
            task: The task's name.
        """
        try:
            yield
        except WriteError:  # a full disk is no task's own
            raise
        except Exception as error:  # a bug of one task, too, must not cost the others; `report` raises it
            if not self._keep_going:
                if is_mistake(error):
                    raise ValueError(f"Task {task!r}: {reason(error)}") from error
                raise
            traceback.clear_frames(error.__traceback__)  # which hold the task's model
            self._errors[task] = error

    def report(self, tasks: Sequence[str]) -> None:
        """Ends the run if tasks are missing.

        Args:
            tasks: All tasks that were to be finetuned.

        Raises:
            ValueError: If tasks failed, with the reason of each.
            ExceptionGroup: If some of them failed by a bug, with its traceback.
        """
        if not self._errors:
            return
        lines = [f"  task {task!r}: {reason(error)}" for task, error in self._errors.items()]
        finetuned = [task for task in tasks if task not in self._errors]
        kept = f"Finetuned: {', '.join(finetuned)}. " if finetuned else ""
        summary = "Not finetuned, so nothing is merged:\n" + "\n".join(lines)
        summary += f"\n{kept}Once this is mended, the same command finetunes what is missing."
        bugs = [error for error in self._errors.values() if not is_mistake(error)]
        if bugs:
            raise ExceptionGroup(summary, bugs)
        raise ValueError(summary) from next(iter(self._errors.values()))


def is_mistake(error: BaseException) -> bool:
    """Whether an error is about input or surroundings; anything else is a bug, whose traceback is wanted.

    Args:
        error: Any error. One that a library has put around such an error counts as that error.
    """
    if isinstance(error, _MISTAKES):
        return True
    return error.__cause__ is not None and is_mistake(error.__cause__)


def reason(error: BaseException) -> str:
    """What an error says in one line: the last one where a worker's traceback is in it, the whole one elsewhere.

    Args:
        error: Any error; one that is no mistake is named by its class.
    """
    if not isinstance(error, _MISTAKES) and error.__cause__ is not None and is_mistake(error):
        return reason(error.__cause__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__}."
    said = lines[-1] if "Traceback" in str(error) else " ".join(lines)
    return said if isinstance(error, _MISTAKES) else f"{type(error).__name__}: {said}"
