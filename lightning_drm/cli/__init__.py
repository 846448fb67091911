"""The command line, ``lightning-drm``."""
