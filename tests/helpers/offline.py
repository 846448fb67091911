"""Imported before anything of a hub: tests ask none, but where they start one of their own.

Without a connection, a hub's client would try again for half a minute before it says so.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
