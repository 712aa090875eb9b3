"""Where results may be written: no file of another's is lost, and what cannot be written is known before it is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kcwb.circuits.circuit import Circuit
from kcwb.errors import SettingError
from kcwb.files import write_text
from kcwb.models.graph import Graph
from kcwb.outputs import CIRCUIT, PAGE, PAGE_MARK, PDF, PDF_MARK, check_output, same_text, settle

PAGE_TEXT = f"<!DOCTYPE html>\n<html>\n<head>{PAGE_MARK}</head></html>"
FOREIGN = ["", "mine", "<html></html>", '{"format": "mine"}', "%PDF-1.4\n%%EOF\n", f"{'x' * 5000}{PAGE_MARK}"]


def refusal(path: Path, **more: object) -> str:
    """Why a page must not be written there."""
    with pytest.raises(SettingError) as error:
        check_output(path, PAGE, **more)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("text", FOREIGN)
@pytest.mark.parametrize("kind", [PAGE, PDF, CIRCUIT, same_text("other")])
def test_what_kcwb_did_not_write_is_kept_unless_it_is_forced(tmp_path: Path, text: str, kind) -> None:
    path = tmp_path / "x.html"
    path.write_text(text)
    with pytest.raises(SettingError, match=f"x.html' is kept: only {kind.name} is overwritten"):
        check_output(path, kind)
    check_output(path, kind, force=True)
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_what_kcwb_wrote_is_overwritten_by_its_own_kind_only(tmp_path: Path) -> None:
    page, pdf, circuit = tmp_path / "a.html", tmp_path / "a.pdf", tmp_path / "a.json"
    page.write_text(PAGE_TEXT)
    pdf.write_bytes(b"%PDF-1.4\n%%EOF\n" + PDF_MARK)
    Circuit.empty(Graph(n_layers=1, n_heads=1)).save(circuit)
    ours = {page: PAGE, pdf: PDF, circuit: CIRCUIT}
    for path in ours:
        for kind in ours.values():
            if kind is ours[path]:
                check_output(path, kind)
            else:
                with pytest.raises(SettingError, match="is kept"):
                    check_output(path, kind)


def test_what_is_read_is_never_overwritten_under_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "n.ipynb"
    (tmp_path / "sub").mkdir()
    source.write_text(PAGE_TEXT)  # also if it could be ours
    (tmp_path / "soft.html").symlink_to(source)
    (tmp_path / "chain.html").symlink_to("soft.html")
    os.link(source, tmp_path / "hard.html")
    (tmp_path / "folder").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = ["n.ipynb", "./sub/../n.ipynb", str(source), "soft.html", "chain.html", "hard.html", "folder/n.ipynb"]
    for name in names:
        for force in (False, True):
            assert "is n.ipynb, which is read" in refusal(Path(name), inputs=[source], force=force)
    assert "is new.html, which is read" in refusal(Path("new.html"), inputs=[tmp_path / "new.html"])  # not there yet


def test_what_is_no_file_is_refused_also_if_forced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to("/dev/null")
    for force in (False, True):
        assert "is a folder" in refusal(tmp_path, force=force) and "is a folder" in refusal(Path(""), force=force)
        for name in ("pipe", "null", "loop"):
            assert "no file that could be replaced" in refusal(tmp_path / name, force=force)
        for name in ("a\0b", "x" * 300, "x" * 230):  # the last: with what a draft's name has beside
            assert "cannot be written" in refusal(tmp_path / name, force=force)


def test_a_missing_folder_is_refused_or_can_be_made(tmp_path: Path) -> None:
    assert "no is not a folder. Make it first" in refusal(tmp_path / "no" / "x.html")
    check_output(tmp_path / "no" / "more" / "x.html", PAGE, make_folder=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "file is not a folder" in refusal(tmp_path / "file" / "more" / "x.html", make_folder=True)


def test_a_protected_file_or_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.html").write_text(PAGE_TEXT)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "x.html")  # root may do all
    assert "x.html' is write-protected" in refusal(tmp_path / "x.html", force=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    assert f"the folder {tmp_path} is write-protected" in refusal(tmp_path / "y.html")


def test_a_folder_that_takes_no_file_is_found_out_by_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", touch)
    assert "cannot be written: Read-only file system." in refusal(tmp_path / "x.html")


def test_a_file_that_appeared_meanwhile_is_kept_and_the_result_stands_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x.html"
    assert settle(path, PAGE) == path
    path.write_text("mine")
    (tmp_path / "x (2).html").write_text("too")
    with pytest.warns(UserWarning, match="something else wrote .*x.html"):
        assert settle(path, PAGE) == tmp_path / "x (3).html"
    assert settle(path, PAGE, force=True) == path


def test_a_symbolic_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "real.html").write_text(PAGE_TEXT)
    (tmp_path / "link.html").symlink_to("real.html")
    check_output(tmp_path / "link.html", PAGE)
    write_text(tmp_path / "link.html", "new")
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "real.html").read_text() == "new"
