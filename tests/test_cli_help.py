"""Help pages: complete, readable on 80 columns, and given without importing anything heavy."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from medvision import __version__
from medvision.cli.errors import EXIT_CODES
from medvision.cli.main import main
from medvision.cli.train import DEFAULTS, Model, Transfer

COMMANDS = ("sample", "train", "predict", "export", "report", "doctor")
PAGES = [["--help"], *([command, "--help"] for command in COMMANDS)]
HEAVY = ("torch", "numpy", "pydicom", "SimpleITK", "pandas", "scipy", "matplotlib", "rich")


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.mark.parametrize("arguments", PAGES, ids=" ".join)
def test_help_reads_like_a_manual_page(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    page = capsys.readouterr().out
    assert page.startswith("Usage: medvision")
    sentence = page.split("\n\n")[1].strip()
    assert sentence.count("\n") == 0
    assert sentence.endswith(".")
    assert re.search(r"Examples?:\n +medvision ", page)
    for code, meaning in EXIT_CODES.items():
        assert re.search(rf"^ +{code} +{re.escape(meaning)}$", page, re.MULTILINE)
    assert max(len(line) for line in page.splitlines()) <= 80
    assert "[bold" not in page
    assert "..." not in page.partition("Commands:")[2], "a command's sentence is cut off"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([command, "--help"])
    page = capsys.readouterr().out
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)(?: [A-Z=]+)?(.*)$", page, re.MULTILINE)
    assert {"--json", "--quiet", "--debug", "--help"} <= {name for name, _ in options}
    for name, help_text in options:
        assert help_text.strip(), f"{name} is not explained"


def test_examples_in_help_are_commands_that_parse() -> None:
    """Run each example with --help put behind it: typer refuses options that do not exist."""
    import medvision.cli.main as module

    for command in COMMANDS:
        for example in re.findall(r"^  (medvision .*)$", getattr(module, command).EPILOG, re.M):
            words = example.partition(" >")[0].split()[1:]
            assert main([*words, "--help"]) == 0
            assert words[0] == command


def test_defaults_in_the_help_of_train_are_those_of_the_settings() -> None:
    from medvision.training.config import TrainConfig

    settings = TrainConfig()
    for name, text in DEFAULTS.items():
        default = settings.model.name if name == "model" else getattr(settings, name)
        assert (f"{default:g}" if isinstance(default, float) else str(default)) == text


def test_every_model_of_the_family_can_be_asked_for() -> None:
    from medvision.models.family import BUILDERS, CRITERIA
    from medvision.models.family_config import MODEL_CONFIGS

    names = [model.value for model in Model]
    assert names == list(MODEL_CONFIGS)
    assert set(names) == set(BUILDERS) == set(CRITERIA)
    for name, config in MODEL_CONFIGS.items():
        assert config().name == name  # type: ignore[attr-defined]


def test_every_transfer_can_be_asked_for() -> None:
    from typing import get_args

    from medvision.training import transfer

    assert [way.value for way in Transfer] == list(get_args(transfer.Transfer))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"medvision {__version__}\n"


def test_no_arguments_show_the_help_and_count_as_wrong_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 2
    assert "Commands:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--version"], *PAGES, ["tran"], ["train"], ["train", "--epochs", "3"]],
    ids=" ".join,
)
def test_answers_before_anything_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from medvision.cli.main import main\n"
        f"main({arguments!r})\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "HEAVY []"


def test_python_m_medvision_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "medvision", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"medvision {__version__}\n"
