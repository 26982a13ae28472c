"""The subcommands of `chorus`: a file each, whose `main` takes the arguments behind its name."""
