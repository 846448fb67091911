"""What a task may be called: its name becomes a folder, a file and a row of the report."""

_RESERVED = {"average"}  # the report's row for all tasks together


def check_task_name(name: str) -> None:
    """Refuses names that cannot be folder names.

    Args:
        name: A task's name.

    Raises:
        ValueError: Naming the rule and the name.
    """
    forbidden = [character for character in name if character in '/\\:*?"<>|' or not character.isprintable()]
    if not name or name != name.strip() or name[0] == "." or forbidden or name in _RESERVED:
        raise ValueError(
            "Expected task names that can be folder names (not empty, no '/' or other special characters, not starting "
            f"with '.', not 'average'), got {name!r}."
        )
