"""How a command line with a mistake ends."""

import pytest

from lightning_drm.cli.main import main

METHODS = (
    "DRM, TIES, DARETIES, TaskArithmetic, Average, IsoC, IsoCTS, TSVM, WUDI, DCMerge, STAR, KnOTS, RegMean, Fisher"
)


def said(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line with which a command ends that has a mistake."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lightning-drm: ")
    return line.removeprefix("lightning-drm: ")
