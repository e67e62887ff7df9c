"""Make ``python -m medvision`` the same as the ``medvision`` command."""

from medvision.cli.main import run

if __name__ == "__main__":
    run()
