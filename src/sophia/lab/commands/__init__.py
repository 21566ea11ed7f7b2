"""Subcommands of `sophia`, one module each: a frozen dataclass of options with a method ``run``.

A module here imports nothing heavy at its top: all of them are imported for any help text. To add a command,
write such a module and name it in ``sophia.lab.cli.commands``.
"""
