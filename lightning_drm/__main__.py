"""``python -m lightning_drm`` is ``lightning-drm``."""

from lightning_drm.cli.main import main

if __name__ == "__main__":
    main()
