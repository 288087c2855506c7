"""For processes that a test starts: Python imports this module by itself when it begins."""

import os

if os.environ.get("PEER_ATTACH"):
    from peer_attach import attach_all

    attach_all()
