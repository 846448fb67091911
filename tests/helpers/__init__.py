"""What tests share. No test asks a hub, unless it starts one of its own.

Without a connection, a hub's client would try again for half a minute before it says so.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
