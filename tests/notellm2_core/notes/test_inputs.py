"""NoteInputs as options of a command, and back."""

from argparse import ArgumentParser
from pathlib import Path

import pytest

from notellm2_core.notes.inputs import ImageFolders, NoteInputs

FOLDERS = ImageFolders(Path("lake/notes"), Path("source"))


@pytest.mark.parametrize("image_folders", [None, FOLDERS])
def test_inputs_are_parsed_from_their_options(image_folders: ImageFolders | None) -> None:
    parser = ArgumentParser()
    NoteInputs.add_arguments(parser)
    inputs = NoteInputs(Path("a notes folder"), Path("images"), Path("store"), image_folders)
    assert NoteInputs.of(parser.parse_args(inputs.arguments())) == inputs
    assert inputs.vision == Path("images/vision")


def test_the_options() -> None:
    inputs = NoteInputs(Path("n"), Path("i"), Path("s"), FOLDERS)
    assert " ".join(inputs.arguments()) == "--notes n --images i --store s --image-folders lake/notes source"


@pytest.mark.parametrize("left_out", ["--notes", "--images", "--store"])
def test_only_the_image_folders_are_optional(left_out: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    NoteInputs.add_arguments(parser)
    options = NoteInputs(Path("n"), Path("i"), Path("s")).arguments()
    position = options.index(left_out)
    with pytest.raises(SystemExit):
        parser.parse_args(options[:position] + options[position + 2 :])
    assert f"required: {left_out}" in capsys.readouterr().err
