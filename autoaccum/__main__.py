"""`python -m autoaccum`, and what the `autoaccum` command runs."""

__all__ = ["main"]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    from autoaccum.cli.main import cli

    cli(prog_name="autoaccum")


if __name__ == "__main__":  # a spawned trial imports this module again, and must not start over
    main()
