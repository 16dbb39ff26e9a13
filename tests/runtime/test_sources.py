"""Which files a run takes, and names that never meet."""

import glob
import io
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsgnn.runtime.disk import signatures
from dsgnn.runtime.disk.sources import Source, find_sources, name_outputs


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with photos in a/, a/deep/ and b/."""
    for name in (
        *("a/x.jpg", "a/x.png", "a/y.JPEG", "a/deep/x.jpg", "a/clip.mp4", "a/notes.txt"),
        *("a/.hidden.jpg", "a/.trash/z.jpg", "b/x.jpg", "b/photo.heic", "empty/readme.txt"),
        *("out/x.overlay.jpg", "a[1].jpg"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(*arguments: str, out: str = "out") -> dict[str, str]:
    """What is taken → the name of its outputs."""
    found = find_sources(arguments, Path(out))
    assert not [source for source in found.sources if source.problem]
    return {source.shown: source.name for source in found.sources}


def problems(*arguments: str) -> dict[str, str]:
    found = find_sources(arguments, Path("out"))
    return {source.shown: source.problem for source in found.sources if source.problem}


def test_a_file(tree: Path) -> None:
    assert names("a/x.jpg") == {"a/x.jpg": "x"}
    (source,) = find_sources(["a/x.jpg"], tree / "out").sources
    assert source.path == tree / "a/x.jpg" and not source.is_video


def test_a_folder(tree: Path) -> None:
    assert names("b") == {"b/photo.heic": "photo", "b/x.jpg": "x"}
    assert names("a") == {
        "a/clip.mp4": "clip",
        "a/x.jpg": "x.jpg",
        "a/x.png": "x.png",
        "a/y.JPEG": "y",
        "a/deep/x.jpg": "deep/x",
    }
    found = find_sources(["a"], tree / "out")
    assert found.passed_over == 1  # notes.txt; hidden files are not spoken of
    assert [source.is_video for source in found.sources] == [True, False, False, False, False]


def test_the_output_folder_is_not_taken(tree: Path) -> None:
    assert "./out/x.overlay.jpg" in names(".", out="elsewhere")
    assert "./out/x.overlay.jpg" not in names(".")
    assert "out/x.overlay.jpg" not in names("*/*.jpg")


def test_the_output_folder_as_a_source(tree: Path) -> None:
    message = "the output folder a is also a source.*give the outputs a folder of their own"
    for source in ("a", "./a/", str(tree / "a")):
        with pytest.raises(ValueError, match=message):
            find_sources([source], Path("a"))


def test_equal_names_keep_suffixes_then_folders(tree: Path) -> None:
    assert names("a/x.jpg", "b/x.jpg", "a/x.png") == {
        "a/x.jpg": "a/x.jpg",
        "b/x.jpg": "b/x.jpg",
        "a/x.png": "x.png",
    }
    assert names("a/x.png", "b/x.jpg") == {"a/x.png": "x.png", "b/x.jpg": "x.jpg"}
    assert names("a", "b")["b/x.jpg"] == "b/x.jpg"


def test_the_order_of_the_sources_makes_no_difference(tree: Path) -> None:
    assert names("a", "b/x.jpg", "a/deep") == names("a/deep", "a", "b/x.jpg")


def test_a_source_given_twice_is_taken_once(tree: Path) -> None:
    assert names("a/x.jpg", "./a/x.jpg", str(tree / "a/x.jpg")) == {"a/x.jpg": "x"}
    shown = [source.shown for source in find_sources(["b/x.jpg", "b", "-", "-"], tree).sources]
    assert shown == ["b/x.jpg", "b/photo.heic", "stdin"]


def test_patterns_that_the_shell_left(tree: Path) -> None:
    assert names("a/*.jpg") == {"a/x.jpg": "x"}
    assert set(names("**/x.*")) == {"a/x.jpg", "a/x.png", "a/deep/x.jpg", "b/x.jpg"}
    assert names("[b]") == names("b")  # a pattern that matches a folder
    assert names("a[1].jpg") == {"a[1].jpg": "a[1]"}  # a file of that very name


def name(*paths: str) -> list[str]:
    return [item.name for item in name_outputs([Source(Path(path), path) for path in paths])]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/p/a.jpg", "/p/b.jpg"], ["a", "b"]),
        (["/p/1/a.jpg", "/p/2/a.jpg"], ["1/a.jpg", "2/a.jpg"]),
        (["/p/1/q/a.jpg", "/p/2/q/a.jpg"], ["1/q/a.jpg", "2/q/a.jpg"]),
        (["/p/1/q/a.jpg", "/p/2/q/a.jpg", "/q/a.jpg"], ["1/q/a.jpg", "2/q/a.jpg", "q/a.jpg"]),
        # a name that looks like another's longer form
        (["/p/a.jpg", "/p/a.png", "/p/a.jpg.png"], ["p/a.jpg", "a.png", "a.jpg.png"]),
        # names that differ in letter case or Unicode form only
        (["/p/1/A.jpg", "/p/2/a.JPG"], ["1/A.jpg", "2/a.JPG"]),
        (["/p/1/\u00e9.jpg", "/p/2/e\u0301.jpg"], ["1/\u00e9.jpg", "2/e\u0301.jpg"]),
    ],
)
def test_names(paths: list[str], expected: list[str]) -> None:
    assert name(*paths) == expected
    assert name(*reversed(paths)) == expected[::-1]


def test_paths_that_differ_in_letter_case_only() -> None:
    upper, lower = name("/p/A.jpg", "/p/a.jpg")
    assert upper.startswith("p/A.jpg-") and lower.startswith("p/a.jpg-")
    assert upper.casefold() != lower.casefold()


def test_standard_input_and_a_file_of_that_name() -> None:
    sources = [Source(None, "stdin"), Source(Path("/p/stdin.jpg"), "p/stdin.jpg")]
    assert [item.name for item in name_outputs(sources)] == ["stdin", "stdin.jpg"]


def test_many_names_never_meet() -> None:
    """Every path of three levels over a few awkward parts."""
    parts = ["a", "A", "a.jpg", "stdin"]
    paths = [f"/{one}/{two}/{three}.jpg" for one in parts for two in parts for three in parts]
    named = name(*paths)
    assert len({item.casefold() for item in named}) == len(paths) == 64


def test_arguments_that_lead_to_nothing(tree: Path) -> None:
    assert problems("nothing.jpg", "*.png", "empty", "a/x.jpg") == {
        "nothing.jpg": "there is no such file or folder",
        "*.png": "nothing matches the pattern (what lies in out is not taken)",
        "empty": "the folder holds no image or video",
    }


def test_a_missing_file_takes_no_name(tree: Path) -> None:
    found = find_sources(["a/x.jpg", "gone/x.jpg"], tree / "out")
    assert [source.name for source in found.sources] == ["x", ""]


def test_linked_folders_are_not_followed(tree: Path) -> None:
    (tree / "b/loop").symlink_to(tree / "b", target_is_directory=True)
    assert names("b") == {"b/photo.heic": "photo", "b/x.jpg": "x"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no such pipes")
def test_a_pipe_in_a_folder_is_not_waited_for(tree: Path) -> None:
    os.mkfifo("b/live.jpg")
    (tree / "b/broken.jpg").symlink_to("gone.jpg")
    assert set(names("b")) == {"b/photo.heic", "b/x.jpg", "b/broken.jpg"}
    assert find_sources(["b"], tree / "out").passed_over == 1
    assert names("b/live.jpg") == {"b/live.jpg": "live"}  # asked for, as <(command) is


def test_a_folder_that_cannot_be_listed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", "b/secret"))
        yield "b", [], ["x.jpg"]

    monkeypatch.setattr("dsgnn.runtime.disk.sources.os.walk", walk)
    assert problems("b") == {"b/secret": "Permission denied"}


@pytest.mark.parametrize(
    ("argument", "feed", "shown", "name"),
    [
        ("0", "camera", "camera 0", "camera0"),
        ("rtsp://me:secret@cam.local:554/live?x=1", "url", None, "cam.local-554-live"),
        ("https://host/a/clip.mp4", "url", None, "host-a-clip.mp4"),
        ("shots/a_%04d.png", "sequence", "shots/a_%04d.png", "a"),
        ("shots/%d.png", "sequence", "shots/%d.png", "shots"),
    ],
)
def test_feeds(argument: str, feed: str, shown: str | None, name: str, tmp_path: Path) -> None:
    (source,) = find_sources([argument], tmp_path / "out").sources
    assert (source.feed, source.name, source.path) == (feed, name, None)
    assert source.shown == shown or "secret" not in source.shown
    assert source.address == argument and source.is_video
    assert source.is_live == (argument[0] in "0r")


def test_a_file_comes_before_a_feed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("0").touch()
    Path("a%d.png").touch()
    for source in find_sources(["0", "a%d.png"], Path("out")).sources:
        assert source.feed == "" and source.path is not None


def test_feeds_of_one_name(tmp_path: Path) -> None:
    addresses = ["http://host/a?x=1", "http://host/a?x=2", "http://host/a?x=1"]
    one, two = find_sources(addresses, tmp_path / "out").sources
    assert one.name != two.name and one.name.startswith("host-a-")


def test_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.png").touch()
    Path("list.txt").write_text("# photos\nx.png\n\n  0  \nmissing.png\n")
    found = find_sources(["list.txt"], Path("out")).sources
    assert [(source.shown, bool(source.problem)) for source in found] == [
        ("x.png", False),
        ("camera 0", False),
        ("missing.png", True),
    ]
    Path("list.txt").write_bytes(b"caf\xe9.png\r\n")  # a name that is not Unicode
    (source,) = find_sources(["list.txt"], Path("out")).sources
    assert os.fsencode(source.path.name) == b"caf\xe9.png"
    Path("list.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"the list list.txt names no source"):
        find_sources(["list.txt"], Path("out"))


def test_a_name_that_cannot_be(tmp_path: Path) -> None:
    """The system takes no name with the character of code 0; a list may hold one."""
    path = tmp_path / "list.txt"
    path.write_text("a\0b.png\n")
    (source,) = find_sources([str(path)], tmp_path / "out").sources
    assert source.problem == "a name cannot hold the character of code 0" and source.path is None


def test_links_that_lead_back_add_nothing(tree: Path) -> None:
    """A folder's link to itself, to its parent, to a sibling that links back, and broken links."""
    (tree / "b/self").symlink_to("self", target_is_directory=True)
    (tree / "b/here").symlink_to(".", target_is_directory=True)
    (tree / "b/up").symlink_to("..", target_is_directory=True)
    (tree / "b/there").symlink_to("../a/deep", target_is_directory=True)
    (tree / "a/deep/back").symlink_to("../../b", target_is_directory=True)
    assert names("b/**/*.jpg") == {"b/x.jpg": "x"}
    assert set(names("**/x.jpg")) == {"a/x.jpg", "a/deep/x.jpg", "b/x.jpg"}
    assert names("b/here/x.jpg") == {"b/here/x.jpg": "x"}  # a link that is named is followed
    (tree / "b/broken.jpg").symlink_to("gone.jpg")
    (tree / "b/round.jpg").symlink_to("round.jpg")
    found = find_sources(["b/**/*.jpg", "b/self", "b/self/x.jpg"], tree / "out").sources
    missing = "there is no such file or folder"
    assert [(source.shown, source.problem) for source in found] == [
        *(("b/broken.jpg", missing), ("b/round.jpg", missing), ("b/x.jpg", "")),
        *(("b/self", missing), ("b/self/x.jpg", missing)),
    ]


def test_a_pattern_in_a_folder_with_brackets(tree: Path) -> None:
    (tree / "trip [2024]/day[1]").mkdir(parents=True)
    (tree / "trip [2024]/x.jpg").touch()
    (tree / "trip [2024]/day[1]/y.jpg").touch()
    (tree / "trip 2").mkdir()
    (tree / "trip 2/z.jpg").touch()
    assert set(names("trip [2024]/*.jpg")) == {"trip [2024]/x.jpg"}
    assert set(names("trip [2024]/**/*.jpg")) == {
        "trip [2024]/x.jpg",
        "trip [2024]/day[1]/y.jpg",
    }
    assert set(names("trip [0-9]/*.jpg")) == {"trip 2/z.jpg"}  # still a pattern elsewhere
    assert set(names(str(tree / "trip [2024]/day[1]/?.jpg"))) == {
        str(tree / "trip [2024]/day[1]/y.jpg")
    }


@pytest.mark.parametrize(
    "pattern",
    ["*", "**", "a/*", "*/*", "**/*.jpg", "a/**", "./a/**/x.*", "a//x.*", "?/x.jpg", "a/[xy].*"],
)
def test_patterns_mean_what_they_mean_to_python(tree: Path, pattern: str) -> None:
    """Where there are no links and no brackets in names."""
    (tree / "a[1].jpg").unlink()
    (tree / "a/notes.txt").unlink()  # these would be lists
    (tree / "empty/readme.txt").unlink()
    out = tree / "elsewhere"
    wanted = find_sources(sorted(glob.glob(pattern, recursive=True)), out).sources
    found = find_sources([pattern], out).sources
    assert {s.path: s.name for s in found} == {s.path: s.name for s in wanted}


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_lists_in_unicode(tree: Path, coding: str) -> None:
    mark = "\ufeff" if coding == "utf-16-le" else ""
    (tree / "b/grüße.jpg").touch()
    text = mark + "# photos\r\nb/grüße.jpg\r\n\r\nb/x.jpg\r\n"
    (tree / "list.txt").write_bytes(text.encode(coding))
    assert set(names("list.txt")) == {"b/grüße.jpg", "b/x.jpg"}


def test_a_list_that_is_no_text(tree: Path) -> None:
    (tree / "list.txt").write_bytes(b"\xff\xfea\0.\0j")
    with pytest.raises(
        ValueError, match=r"the list list.txt is no whole UTF-16.* save it as UTF-8"
    ):
        find_sources(["list.txt"], tree / "out")


def test_a_list_is_relative_to_itself(tree: Path) -> None:
    (tree / "b/list.txt").write_text("x.jpg\n../a/*.png\nshot%d.png\n" + str(tree / "a/x.jpg"))
    (tree / "b/shot1.png").touch()
    assert set(names("b/list.txt")) == {
        *("b/x.jpg", "b/../a/x.png", "b/shot%d.png", str(tree / "a/x.jpg"))
    }


def test_a_photo_that_is_called_like_a_list_is_a_photo(tree: Path) -> None:
    data = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    (tree / "photo.txt").write_bytes(data)
    found = find_sources([str(tree / "photo.txt")], tree / "out")
    assert [source.path for source in found.sources] == [tree / "photo.txt"]
    assert not found.sources[0].problem


@pytest.mark.parametrize("address", ["ftp://host/a.jpg", "file:///a.jpg", "s3://bucket/a.jpg"])
def test_an_address_that_cannot_be_read_is_told(address: str, tmp_path: Path) -> None:
    (source,) = find_sources([address], tmp_path / "out").sources
    assert source.problem.startswith("an address of this kind cannot be read: expected rtsp, ")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_called_like_a_video_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "clip.MP4")
    os.mkfifo(tmp_path / "photo")
    names = [str(tmp_path / "clip.MP4"), str(tmp_path / "photo")]
    clip, photo = find_sources(names, tmp_path / "out").sources
    assert clip.problem.startswith("it is a pipe: hand a video")
    assert not photo.problem


def test_what_leads_to_nothing_is_not_counted_as_found(tree: Path) -> None:
    found = find_sources([str(tree / "missing.jpg"), str(tree)], tree / "out")
    ranked = len(found.sources) - 1
    assert ranked and str(found).startswith(f"photos and videos found: {ranked}")


def test_one_bad_line_of_a_list_is_one_failed_source(tree: Path) -> None:
    (tree / "list.txt").write_text("b/x.jpg\nhttp://[::1/a.jpg\nhttps://\na\0.jpg\nrtsp://[/x\n")
    found = find_sources(["list.txt"], tree / "out").sources
    assert [source.shown for source in found][0] == "b/x.jpg" and len(found) == 5


def test_suffixes_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    videos = ["mxf", "vob", "asf", "3g2", "f4v", "h264", "hevc", "dv", "y4m"]
    for suffix in [*videos, "apng", "mka", "nef"]:
        Path(f"x.{suffix}").touch()
    found = find_sources(["."], Path("out"))
    taken = {source.path.suffix[1:] for source in found.sources}
    assert taken == {*videos, "apng"}
    assert found.passed_over == 2


@pytest.mark.parametrize("number", [2**31, 10**20])
def test_a_number_that_no_camera_has(number: int, tmp_path: Path) -> None:
    """OpenCV would take it for another number, or complain in its own words."""
    (source,) = find_sources([str(number)], tmp_path / "out").sources
    assert source.problem == "there is no camera of such a number"


def test_a_gif_of_nothing_but_blocks_is_not_read_to_its_end() -> None:
    """A million blocks of one byte, which cost seconds to walk: it is told by a part of them."""
    data = b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\x01\x00" * 1_000_000

    class Counted(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.reads += 1
            return super().read(size)

    file = Counted(data)
    assert signatures.kind(file) == "image"
    assert file.reads < 200_000 < len(data) // 2
