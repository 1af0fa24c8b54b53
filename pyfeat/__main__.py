"""Entry of the command line: ``pyfeat`` or ``python -m pyfeat``."""

from pyfeat._extras import require


def main() -> None:
    """Run the command line."""
    require("typer", extra="anomaly", op="pyfeat")
    from pyfeat.cli import app

    app()


if __name__ == "__main__":
    main()
