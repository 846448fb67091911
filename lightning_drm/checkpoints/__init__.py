"""Merging what is on disk: finetunes of any format in, one model or adapter out, streamed parameter by parameter."""
