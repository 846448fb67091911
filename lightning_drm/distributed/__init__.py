"""The processes that work on one run: starting them, meeting, and noticing that one is gone."""
