"""``grpo-fast train``: settings from a file and the command line, data from anywhere, rewards by name, and then the trainer."""
