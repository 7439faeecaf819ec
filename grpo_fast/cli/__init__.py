"""The command line: ``grpo-fast``, one module per subcommand."""
