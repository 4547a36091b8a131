"""What a training run leaves behind is whole, whatever interrupts its writing."""

from pathlib import Path

import pytest

from diffusers_leanvae.trainer.checkpoints import write_folder


def test_a_folder_takes_its_place_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "vae"
    for text in ("first", "second"):
        with write_folder(target) as folder:
            (folder / "weights").write_text(text)
            assert folder.parent == tmp_path and folder != target
    with pytest.raises(KeyboardInterrupt), write_folder(target) as folder:
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (target / "weights").read_text() == "second"
    with write_folder(target) as folder:  # nothing of the interrupted one is left in it
        assert list(folder.iterdir()) == []
        (folder / "other").write_text("third")
    assert [path.name for path in tmp_path.rglob("*")] == ["vae", "other"]
