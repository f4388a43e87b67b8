"""The installed command `paligemma-jax`: which subcommand is called, with what, and what a mistake says."""

import importlib

import pytest

from paligemma_jax.commands import cli

NAMES = ["train", "eval", "predict", "plan", "convert"]


def ends(capsys, *arguments) -> tuple[int, str, str]:
    """Exit status and what is printed, of a command that ends by itself."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(["/bin/paligemma-jax", *arguments])
    printed = capsys.readouterr()
    return stopped.value.code, printed.out, printed.err


@pytest.mark.parametrize("name", NAMES)
def test_a_subcommand_gets_the_other_arguments(monkeypatch, name):
    calls, module = [], importlib.import_module(cli.SUBCOMMANDS[name][0])
    monkeypatch.setattr(module, "main", calls.append)
    cli.main(["/bin/paligemma-jax", name, "--workdir=x", "--help"])
    assert calls == [[f"/bin/paligemma-jax {name}", "--workdir=x", "--help"]]


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_subcommand_is_that_of_its_script(capsys, name):
    status, out, err = ends(capsys, name, "--help")
    module = importlib.import_module(cli.SUBCOMMANDS[name][0])
    assert (status, err) == (0, "") and out.startswith(module.__doc__.strip()) and "--help" in out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_subcommands(capsys, flag):
    cli.main(["paligemma-jax", flag])
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES == list(cli.SUBCOMMANDS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no subcommand, expected one of train, eval, predict, plan, convert: see --help"),
        (["trian"], "unknown subcommand 'trian', expected one of train, eval, predict, plan, convert; did you mean"),
        (["--config=x"], "unknown subcommand '--config=x', expected one of train, eval, predict, plan, convert"),
    ],
)
def test_a_wrong_subcommand_is_one_sentence(capsys, arguments, sentence):
    status, out, err = ends(capsys, *arguments)
    assert (status, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith(f"paligemma-jax: error: {sentence}")


def test_an_error_of_a_subcommand_names_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = "paligemma-jax train: error: --config=absent.py: there is no file absent.py\n"
    assert ends(capsys, "train", "--config=absent.py") == (2, "", expected)


def test_a_config_is_found_relative_to_the_current_folder(capsys, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text("raise ValueError('read')\n")
    monkeypatch.chdir(tmp_path)
    status, _, err = ends(capsys, "train", "--config=configs/mine.py")
    assert status == 2 and "--config=configs/mine.py: line 1: ValueError: read" in err
