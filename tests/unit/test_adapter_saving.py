"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kt_sft.integrations.adapter_saving import whole_file
from kt_sft.loading.errors import CheckpointError


def test_the_last_of_several_savers_wins_with_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    with whole_file(path) as slow:
        slow.write_text("slow, and")
        with whole_file(path) as fast:
            fast.write_text("fast")
        assert path.read_text() == "fast"
        with slow.open("a") as file:
            file.write(" whole")
    assert path.read_text() == "slow, and whole"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_text("earlier")

    def save() -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(CheckpointError, match="disk is full"):
        save()
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_replaced_and_what_it_points_to_stays(there: bool, tmp_path: Path) -> None:
    """As in the hub's cache: several folders share one file, whose name is that of its contents."""
    shared, path = tmp_path / "blob", tmp_path / "adapter_model.safetensors"
    if there:
        shared.write_text("shared")
    path.symlink_to(shared)
    with whole_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert not path.is_symlink()
    assert shared.exists() == there
    assert not there or shared.read_text() == "shared"
