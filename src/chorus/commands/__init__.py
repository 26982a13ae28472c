"""The subcommands of `chorus`: one file each, whose `main` takes the remaining arguments."""
