"""An output directory that cannot be written is found before anything long, by every recipe that has no test of it."""

from pathlib import Path

import pytest
import torch

from tests.recipes.runs import recipe_module


@pytest.mark.parametrize("name", ["chunked_loss", "compile_qlora", "nf4_dequant"])
def test_a_directory_that_cannot_be_made_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    recipe = recipe_module(name)
    if name == "nf4_dequant":  # without a GPU it refuses to time
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for output_dir, message in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "run", "cannot be written")):
        with pytest.raises(ValueError, match=f"output_dir .* {message}"):
            recipe.main(output_dir=output_dir)
