"""The processes that work on one run: how they start, how they meet, and how they notice that one of them died."""
