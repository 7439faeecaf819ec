"""Helpers without knowledge of GRPO that several packages share: files, environment, statistics, text statistics, install hints."""
