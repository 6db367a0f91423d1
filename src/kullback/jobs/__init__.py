"""The jobs behind the command line: a configuration dataclass and `run(config)` for each."""
