"""From what a user writes, a path or a hub name, to a file or folder on this machine."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from lightning_drm.pretrained import REVISION, resolve_pretrained

_OTHER_FRAMEWORKS = ["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.ot"]


def locate(name: str) -> Path:
    """Finds a file or folder; what is only on the hub is downloaded.

    Args:
        name: A folder, a file, ``package:…`` or a hub name, which may end in a revision: ``org/model@v1.0``.

    Raises:
        ValueError: If it is neither here nor on the hub, or the hub cannot be asked.
    """
    path = Path(resolve_pretrained(name)).expanduser()
    if path.exists():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no file or folder {name}.")
    repository, _, revision = name.partition(REVISION)
    try:
        return Path(snapshot_download(repository, revision=revision or None, ignore_patterns=_OTHER_FRAMEWORKS))
    except RevisionNotFoundError as error:
        raise ValueError(f"The hub has {repository}, but no revision {revision!r} of it.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{name} is no file or folder here, and the hub has no model of this name that you may read."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is no file or folder here, and the hub cannot be asked: there is no connection, or HF_HUB_OFFLINE "
            "is set."
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is no file or folder here, and the hub does not provide it: {reason}") from error
