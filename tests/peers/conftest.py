"""Peer tests need torch, which nothing else here does: without it they are not collected, and `make test-peers` fails for want of tests."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
