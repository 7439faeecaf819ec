"""What every suite of the benchmark shares: settings, worker processes, clocks and memory, gates, result files, tables and figures."""
