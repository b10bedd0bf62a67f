"""The `triptych` command: one file per subcommand, thin, each imported only when it runs."""
