"""Run by test_nodes: ``lightning-drm``, whose ranks miss another node after seconds."""

from lightning_drm.cli.main import main
from lightning_drm.distributed import watch

if __name__ == "__main__":
    watch._PROBES |= {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3}
    main()
