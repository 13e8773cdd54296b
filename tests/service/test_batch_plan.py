"""What a batch has to do: which sounds, who speaks them, what the results are called, and what is done."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.batch_plan import BatchError, BatchRequest, Step, find_items, plan
from service.config import Settings, load_settings
from service.manifest import Manifest

Lay = Callable[..., None]


@pytest.fixture
def lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lay:
    """Makes files with these contents; a name alone is a file that holds its own name."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str, **contents: str) -> None:
        for name, content in {**{name: name for name in names}, **contents}.items():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(content)

    make("face.png")
    return make


def request(*sources: str, image: tuple[str, ...] = ("face.png",), **options: Any) -> BatchRequest:
    return BatchRequest(tuple(map(Path, sources)), tuple(map(Path, image)), Path("out"), **options)


def planned(asked: BatchRequest, settings: Settings | None = None) -> list[Step]:
    settings = settings or load_settings()
    return plan(find_items(asked, settings), asked, settings, Manifest(asked.out / "manifest.jsonl"))


def names(asked: BatchRequest) -> dict[str, str]:
    """Results by the sounds they are of."""
    return {str(step.item.audio): step.item.name for step in planned(asked)}


def does(asked: BatchRequest) -> dict[str, str]:
    return {step.item.name: step.do for step in planned(asked)}


def finish(asked: BatchRequest, *only: str) -> None:
    """What a run over it would leave: results and lines of the manifest."""
    manifest = Manifest(asked.out / "manifest.jsonl")
    for step in planned(asked):
        if step.do in ("make", "copy") and (not only or step.item.name in only):
            path = asked.out / step.item.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(step.item.key)
            audio = str(step.item.audio.absolute())
            record = {"state": "done", "key": step.item.key, "name": step.item.name, "audio": audio}
            manifest.add({**record, "bytes": path.stat().st_size, "inputs": step.item.inputs})


# Sounds.


def test_a_folder_is_searched_to_its_depth_and_keeps_its_shape(lay):
    lay("in/b.wav", "in/a.mp3", "in/deep/er/c.OGG", "in/notes.txt", "in/.hidden.wav", "in/.git/d.wav")
    assert names(request("in")) == {
        "in/a.mp3": "a.mp4",
        "in/b.wav": "b.mp4",
        "in/deep/er/c.OGG": "deep/er/c.mp4",
    }
    assert list(names(request("in", recursive=False))) == ["in/a.mp3", "in/b.wav"]


def test_patterns_choose_and_leave_out(lay):
    lay("in/a.wav", "in/b.mp3", "in/en/c.wav", "in/de/d.wav", "in/x.dat")
    assert list(names(request("in", patterns=("*.WAV",)))) == ["in/a.wav", "in/de/d.wav", "in/en/c.wav"]
    assert list(names(request("in", patterns=("en/*", "*.dat")))) == ["in/x.dat", "in/en/c.wav"]
    assert list(names(request("in", exclude=("de/", "b.*")))) == ["in/a.wav", "in/en/c.wav"]


def test_files_that_are_named_are_taken_whatever_they_are_called(lay):
    lay("in/a.wav", "speech.bin")
    assert list(names(request("speech.bin", "in", "in/a.wav"))) == ["speech.bin", "in/a.wav"]


def test_results_are_not_taken_for_sounds(lay):
    lay("a.wav", "out/a.mp4", "out/deep/b.mp4")
    assert list(names(request("."))) == ["a.wav"]


@pytest.mark.parametrize("source", ["out", ".", "out/deep/.."])
def test_results_that_lie_among_the_sounds_are_not_taken_for_sounds(lay, source):
    lay("out/a.wav", "out/film.mkv", "out/deep/b.wav")
    asked = request(source, exclude=("face.png",))
    if source == ".":
        asked = replace(asked, out=Path("."))
    finish(asked)
    first = does(asked)
    assert len(first) == 3
    assert set(first.values()) == {"done"}
    for options in ({}, {"patterns": ("*",)}, {"overwrite": True}):
        assert set(does(replace(asked, **options))) == set(first)
    lay("out/new.mp4")
    assert len(find_items(asked, load_settings())) == 4


def test_a_result_of_another_batch_below_the_folder_of_results_is_a_sound(lay):
    lay("in/a.wav")
    finish(replace(request("in"), out=Path("all/en")))
    assert names(replace(request("all/en"), out=Path("all"))) == {"all/en/a.mp4": "a.mp4"}


def test_a_result_that_is_named_is_a_sound(lay):
    lay("in/a.wav")
    finish(request("in"))
    assert names(request("in", "out/a.mp4")) == {"in/a.wav": "a.mp4", "out/a.mp4": "a.mp4.mp4"}


def test_links_to_folders_are_not_followed(lay):
    lay("in/a.wav")
    os.symlink("..", "in/loop")
    assert list(names(request("in"))) == ["in/a.wav"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request("nowhere"), "nowhere: no such file or folder"),
        (request("x" * 5000), "xxx: no such file or folder"),
        (request("in", image=("x" * 5000,)), "xxx: no such file; give a picture"),
        (request("empty"), "empty: there is no sound or video file in it"),
        (request("empty", patterns=("*.wav",)), r"there is no sound file that matches \*\.wav in it"),
        (request("in", image=("nobody.png",)), "--image nobody.png: no such file"),
        (request("in", image=("face.png", "in/a.wav")), "two pictures for all; name them in one table"),
        (request("in", image=()), "a.wav: nobody is to speak it"),
    ],
)
def test_what_cannot_be_begun_is_one_line(lay, asked, message):
    lay("in/a.wav", "empty/notes.txt")
    with pytest.raises(BatchError, match=message):
        find_items(asked, load_settings())


# Tables.


def test_a_table_says_who_speaks_what_and_how(lay):
    lay("in/a.wav", "in/b.wav", "in/deep/b.wav", "pictures/ann.png", "pictures/bob.png")
    lay(**{"t.csv": "audio,image,prompt,seed,name\nin/a.wav,pictures/ann.png,smile,7,\ndeep/b.wav,,,,tea/time\n"})
    steps = planned(request("in", image=("face.png", "t.csv")), load_settings(model__seed=3, model__prompt="talk"))
    told = [(str(s.item.audio), str(s.item.image), s.item.prompt, s.item.seed, s.item.name) for s in steps]
    assert told == [
        ("in/a.wav", "pictures/ann.png", "smile", 7, "a.mp4"),
        ("in/b.wav", "face.png", "talk", 3, "b.mp4"),
        ("in/deep/b.wav", "face.png", "talk", 3, "tea/time.mp4"),
    ]


def test_a_table_of_its_own_names_the_sounds_beside_it(lay):
    lay("show/a.wav", "show/x/b.wav", "show/face.png")
    rows = [{"audio": "a.wav", "image": "face.png", "seed": 1}, {"audio": "x/b.wav", "image": "face.png"}]
    lay(**{"show/t.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    assert names(request(image=("show/t.jsonl",))) == {"show/a.wav": "a.mp4", "show/x/b.wav": "x/b.mp4"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            "a.wav,face.png\nb.wav,face.png\n",
            "show/t.csv:3: audio: show/b.wav: no such file; name one beside the table",
        ),
        ("a.wav,face.png\nx,face.png\n", "show/t.csv:3: audio: show/x: no such file"),
        ("loop.wav,face.png\n", "show/t.csv:2: audio: show/loop.wav: no such file"),
        (f"{'a' * 5000},face.png\n", "show/t.csv:2: audio: show/aaa"),
        ("a.wav,face.png\na.wav,bob.png\n", "show/t.csv:3: image: show/bob.png: no such file; name a picture"),
        ("a.wav,x\n", "show/t.csv:2: image: show/x: no such file"),
    ],
)
def test_what_a_table_names_and_is_not_there_is_told_with_its_line(lay, table, message):
    lay("show/a.wav", "show/x/b.wav", "show/face.png", **{"show/t.csv": f"audio,image\n{table}"})
    os.symlink("loop.wav", "show/loop.wav")
    with pytest.raises(BatchError) as caught:
        find_items(request(image=("show/t.csv",)), load_settings())
    assert str(caught.value).startswith(message)


def test_a_picture_that_is_not_there_is_told_with_its_line_beside_a_folder_too(lay):
    lay("in/a.wav", **{"t.csv": "audio,image\n*.wav,bob.png\n"})
    with pytest.raises(BatchError, match=r"t\.csv:2: image: bob\.png: no such file"):
        find_items(request("in", image=("t.csv",)), load_settings())


def test_two_lines_about_one_sound_are_two_videos(lay):
    lay("in/a.wav", "ann.png", "bob.png")
    lay(**{"t.csv": "audio;image;name\na.wav;ann.png;ann\na.wav;bob.png;bob\n"})
    assert [s.item.name for s in planned(request("in", image=("t.csv",)))] == ["ann.mp4", "bob.mp4"]


def test_a_pattern_in_a_table_is_for_what_no_line_names(lay):
    lay("in/en/a.wav", "in/en/b.wav", "in/de/c.wav", "ann.png", "bob.png")
    lay(**{"t.csv": "audio,image\nen/*,ann.png\n*,face.png\nen/b.wav,bob.png\n"})
    steps = planned(request("in", image=("t.csv",)))
    assert {s.item.name: s.item.image.name for s in steps} == {
        "de/c.mp4": "face.png",
        "en/a.mp4": "ann.png",
        "en/b.mp4": "bob.png",
    }


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("audio,imge\na.wav,x\n", "t.csv:1: 'imge': unknown column; did you mean image?"),
        ("audio,imge\n", "t.csv:1: 'imge': unknown column"),
        ("audio,\na.wav,\n", "t.csv:1: '': unknown column; there are audio, image,"),
        ("audio,seed,seed\na.wav,1,2\n", "t.csv:1: seed: is the title of two columns"),
        ('audio,prompt\na.wav,"smiles\nb.wav,\n', "t.csv:2: is not CSV (unexpected end of data); close each quote"),
        ('audio,prompt\n\na.wav,"smi"les\nb.wav,\n', "t.csv:3: is not CSV (',' expected after '\"'); close each quote"),
        (f"audio,prompt\na.wav,{'x' * 140_000}\n", "t.csv:2: is not CSV (field larger than field limit (131072))"),
        ('audio,prompt\na.wav,"two\nlines"\nz.wav,\n', "t.csv:4: audio: z.wav is none of"),
        ("image\nface.png\n", "t.csv:2: audio: is missing"),
        ("audio,seed\na.wav,-1\n", "t.csv:2: seed: '-1' is not a whole number from 0 on"),
        ("audio,seed\na.wav,1.5\n", "t.csv:2: seed: '1.5' is not"),
        ("audio\na.wav\nb.wav\nz.wav\n", "t.csv:4: audio: z.wav is none of the 2 sounds of this batch"),
        (f"audio\n{'*' * 5000}.ogg\n", "t.csv:2: audio: none of the 2 sounds of this batch matches ***"),
        ("audio\n*.ogg\n", "t.csv:2: audio: none of the 2 sounds of this batch matches *.ogg"),
        ("audio,name\na.wav,../up\n", "t.csv:2: name: '../up' is not a path below the folder of results"),
        ("audio,name\na.wav,/etc/x\n", "t.csv:2: name: '/etc/x' is not a path below"),
        ("audio,name\na.wav,.avatard/lock\n", "is not a path below the folder of results"),
        ("audio,name\na.wav,x\nb.wav,X\n", "name: X.mp4: is to be the name of in/a.wav and of in/b.wav"),
        ("audio\na.wav,b,c\n", "t.csv:2: has more columns than the first line names"),
        ("", "t.csv: is empty"),
    ],
)
def test_a_table_that_is_wrong_is_one_line_that_says_where(lay, table, message):
    lay("in/a.wav", "in/b.wav", **{"t.csv": table})
    with pytest.raises(BatchError) as caught:
        planned(request("in", image=("face.png", "t.csv")))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "t.jsonl:2: is not JSON"),
        ("[]", "t.jsonl:2: is not an object"),
        ('{"audio": 3}', "t.jsonl:2: audio: 3 is"),
        ('{"audio": "\\ud800.wav"}', r"t.jsonl:2: audio: '\\ud800.wav' is not a text"),
        ('{"audio": "a.wav", "image": "\\udfff"}', r"t.jsonl:2: image: '\\udfff' is not a text"),
        ('{"audio": "a.wav", "prompt": "\\udc80"}', r"t.jsonl:2: prompt: '\\udc80' is not a text"),
        ('{"audio": "a.wav", "name": "\\udc80"}', r"t.jsonl:2: name: '\\udc80' is not a"),
        ('{"audio": "\\udc80.wav"}', "t.jsonl:2: audio: \ufffd.wav is none of"),
        ('{"audio": ' + "[" * 100_000 + "]" * 100_000 + "}", "t.jsonl:2: is nested too deeply"),
        ('{"audio": ' + "[" * 800 + "]" * 800 + "}", "t.jsonl:2: audio: .* is not a text"),
        ('{"audio": "a.wav", "seed": Infinity}', "t.jsonl:2: seed: inf is not a whole number"),
        ('{"audio": "a.wav", "prompt": "one\u2028two"}\n{', "t.jsonl:3: is not JSON"),
    ],
)
def test_a_line_that_is_wrong_is_told_by_its_number(lay, line, message):
    lay("in/a.wav", **{"t.jsonl": '{"audio": "a.wav"}\n' + line + "\n"})
    with pytest.raises(BatchError, match=message):
        planned(request("in", image=("face.png", "t.jsonl")))


# Names.


def test_names_that_meet_lose_no_result(lay):
    lay("one/a.wav", "one/a.mp3", "one/B.wav", "one/sub/b.wav", "two/b.wav", "two/a.wav")
    found = names(request("one", "two"))
    assert len({name.casefold() for name in found.values()}) == len(found) == 6
    assert found["one/a.mp3"] == "a.mp3.mp4"
    assert found["one/sub/b.wav"] == "sub/b.mp4"


def test_a_result_keeps_its_name_when_another_sound_comes_that_would_have_it(lay):
    lay("in/a.wav")
    finish(request("in"))
    lay("in/a.mp3", "more/a.wav")
    assert names(request("in")) == {"in/a.mp3": "a.mp3.mp4", "in/a.wav": "a.mp4"}
    assert does(request("in")) == {"a.mp3.mp4": "make", "a.mp4": "done"}
    assert names(request("more")) == {"more/a.wav": "a.wav.mp4"}


def test_a_name_too_long_for_a_file_system_is_shortened_and_stays_its_own(lay):
    first, second = "x" * 240 + "1.wav", "x" * 240 + "2.wav"
    lay(first, second)
    found = names(request(first, second))
    assert len(set(found.values())) == 2
    assert all(len(name) <= 200 and name.endswith(".mp4") for name in found.values())


def test_bytes_that_are_no_text_are_a_name_too(lay):
    os.makedirs("in")
    Path(os.fsdecode(b"in/caf\xe9.wav")).write_text("x")
    asked = request("in")
    assert list(names(asked).values()) == [os.fsdecode(b"caf\xe9.mp4")]
    finish(asked)
    assert list(does(asked).values()) == ["done"]


# What is done.


def test_what_is_done_is_known_by_its_content(lay):
    lay("in/a.wav", "in/b.wav")
    finish(request("in"))
    os.utime("in/a.wav")
    assert does(request("in")) == {"a.mp4": "done", "b.mp4": "done"}
    lay(**{"in/b.wav": "other words"})
    assert does(request("in")) == {"a.mp4": "done", "b.mp4": "make"}


def test_a_sound_under_another_name_is_copied_and_not_made_again(lay):
    lay("in/a.wav", "in/b.wav")
    finish(request("in"))
    os.rename("in/a.wav", "in/c.wav")
    steps = planned(request("in"))
    assert [(s.item.name, s.do, s.source) for s in steps] == [("b.mp4", "done", ""), ("c.mp4", "copy", "a.mp4")]


def test_nothing_is_copied_from_a_name_that_another_video_has_got(lay):
    """All of these files are equally long, so that nothing but the manifest tells them apart."""
    lay(**{"in/a.wav": "one", "in/b.wav": "one"})
    finish(request("in"))
    lay(**{"in/b.wav": "two", "in/c.wav": "one"})
    finish(request("in"), "b.mp4")
    steps = planned(request("in"))
    assert [(s.item.name, s.do, s.source) for s in steps][2:] == [("c.mp4", "copy", "a.mp4")]
    lay(**{"in/a.wav": "three"})
    finish(request("in"), "a.mp4")
    assert does(request("in")) == {"a.mp4": "done", "b.mp4": "done", "c.mp4": "make"}


def test_a_name_that_another_render_had_begun_is_trusted_by_its_content_alone(lay):
    lay("in/a.wav")
    (step,) = planned(request("in"))
    finish(request("in"))
    begun = {"state": "begun", "key": "another", "name": "a.mp4", "audio": str(Path("in/a.wav").absolute())}
    Manifest(Path("out/manifest.jsonl")).add(begun)
    Path("out/a.mp4").write_text("x" * len(step.item.key))
    assert does(request("in")) == {"a.mp4": "make"}


def test_the_same_sound_twice_is_made_once(lay):
    lay(**{"in/a.wav": "same", "in/b.wav": "same", "in/c.wav": "other"})
    steps = planned(request("in"))
    assert [(s.item.name, s.do, s.source) for s in steps] == [
        ("a.mp4", "make", ""),
        ("b.mp4", "copy", "a.mp4"),
        ("c.mp4", "make", ""),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        load_settings(model__seed=1),
        load_settings(model__prompt="smile"),
        load_settings(None, ["encoder.crf=30"]),
        load_settings(model__width=128, model__height=128),
        load_settings(model__steps=2),
    ],
)
def test_settings_that_matter_make_it_anew(lay, settings):
    lay("in/a.wav")
    finish(request("in"))
    assert [step.do for step in planned(request("in"), settings)] == ["make"]


def test_settings_that_do_not_matter_do_not(lay):
    lay("in/a.wav")
    finish(request("in"))
    settings = load_settings(None, ["http.port=1", "jobs.segment_s=3", "model.step_timeout_s=9"])
    assert [step.do for step in planned(request("in"), settings)] == ["done"]


def test_another_picture_makes_it_anew(lay):
    lay("in/a.wav")
    finish(request("in"))
    lay(**{"face.png": "another face"})
    assert does(request("in")) == {"a.mp4": "make"}


def test_a_result_that_is_gone_or_cut_off_is_made_anew(lay):
    lay("in/a.wav", "in/b.wav")
    finish(request("in"))
    os.remove("out/a.mp4")
    os.truncate("out/b.mp4", 3)
    asked = request("in")
    assert [(s.do, s.why[:30]) for s in planned(asked)] == [("make", ""), ("failed", "out/b.mp4: exists already and ")]
    assert does(replace(asked, overwrite=True)) == {"a.mp4": "make", "b.mp4": "make"}


def test_a_file_that_is_not_ours_is_not_replaced(lay):
    lay("in/a.wav", "out/a.mp4")
    (step,) = planned(request("in"))
    assert step.do == "failed"
    assert step.why == "out/a.mp4: exists already and was not made by this batch; remove it, or --overwrite"


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("link", "table", "message"),
    [
        (
            "in/a.wav",
            "audio\n*\n",
            "--out out: the result of in/a.wav would replace in/a.wav, a sound of this batch; name",
        ),
        ("face.png", "audio\n*\n", "would replace face.png, a picture of this batch"),
        ("bob.png", "audio,image\na.wav,bob.png\n", "would replace bob.png, a picture of this batch"),
        ("t.csv", "audio\n*\n", "would replace t.csv, the table of this batch"),
    ],
)
def test_nothing_that_the_batch_is_made_from_is_replaced(lay, link, table, message, overwrite):
    lay("in/a.wav", "bob.png", "out/other.mp4", **{"t.csv": table})
    os.link(link, "out/a.mp4")
    with pytest.raises(BatchError) as caught:
        planned(request("in", image=("face.png", "t.csv"), overwrite=overwrite))
    assert message in str(caught.value)


def test_a_sound_in_the_folder_of_results_is_not_replaced_by_its_result(lay):
    lay("out/film.mp4")
    with pytest.raises(BatchError, match=r"the result of out/film.mp4 would replace out/film.mp4, a sound"):
        planned(request("out", overwrite=True))


def test_a_file_of_a_render_that_was_killed_before_it_was_noted_is_ours(lay):
    lay("in/a.wav", "out/a.mp4")
    (step,) = planned(request("in"))
    manifest = Manifest(Path("out/manifest.jsonl"))
    manifest.add({"state": "begun", "key": step.item.key, "name": "a.mp4", "audio": str(Path("in/a.wav").absolute())})
    assert does(request("in")) == {"a.mp4": "make"}


def test_overwrite_makes_all_of_it_anew(lay):
    lay(**{"in/a.wav": "same", "in/b.wav": "same", "in/c.wav": "other"})
    finish(request("in"))
    assert does(request("in", overwrite=True)) == {"a.mp4": "make", "b.mp4": "copy", "c.mp4": "make"}


def test_what_failed_is_tried_again_where_that_is_wanted_or_it_has_changed(lay):
    lay("in/a.wav")
    asked = request("in")
    (step,) = planned(asked)
    Path("out").mkdir()
    Manifest(Path("out/manifest.jsonl")).add(
        {"state": "failed", "key": step.item.key, "name": "a.mp4", "audio": "a.wav", "error": "a.wav: is noise"}
    )
    (step,) = planned(asked)
    assert (step.do, step.why) == ("failed", "a.wav: is noise (it was tried before; --retry-failed tries it again)")
    assert does(replace(asked, retry_failed=True)) == {"a.mp4": "make"}
    lay(**{"in/a.wav": "words"})
    assert does(asked) == {"a.mp4": "make"}


def test_a_file_that_cannot_be_read_fails_alone(lay):
    lay("in/a.wav")
    os.mkfifo("in/b.wav")
    os.symlink("nowhere", "in/c.wav")
    os.symlink("d.wav", "in/d.wav")
    found = {step.item.audio.name: (step.do, step.why) for step in planned(request("in"))}
    assert found["a.wav"] == ("make", "")
    assert found["b.wav"] == ("failed", "in/b.wav: cannot be read (is no file); check the path and its permissions")
    assert found["c.wav"][1].startswith("in/c.wav: cannot be read (no such file or directory)")
    assert found["d.wav"][1].startswith("in/d.wav: cannot be read (too many levels of symbolic links)")


def test_a_link_to_itself_is_no_bug_beside_a_table(lay):
    lay("in/a.wav", **{"t.csv": "audio,seed\n*.wav,1\na.wav,2\n"})
    os.symlink("b.wav", "in/b.wav")
    assert does(request("in", image=("face.png", "t.csv"))) == {"a.mp4": "make", "b.mp4": "failed"}


def test_a_file_is_read_once_and_not_again_until_it_is_touched(lay, monkeypatch):
    lay("in/a.wav", "in/b.wav")
    finish(request("in"))
    opened: list[str] = []
    path_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or path_open(self, *a, **k))
    planned(request("in"))
    assert not {"a.wav", "b.wav", "face.png"} & set(opened)
    os.utime("in/a.wav", (1, 1))
    planned(request("in"))
    assert opened.count("a.wav") == 1


# The manifest.


@pytest.mark.parametrize(
    "torn", [b'{"state": "done", "key": "k', b"\0\0\0\0", b'{"state": "done"}\n', b"[1]\n", b"\xff\n"]
)
def test_a_torn_line_costs_itself_only(tmp_path, torn):
    path = tmp_path / "manifest.jsonl"
    record = {"state": "done", "name": "a", "audio": "a.wav", "bytes": 1}
    Manifest(path).add({**record, "key": "k1"})
    with path.open("ab") as file:
        file.write(torn)
    Manifest(path).add({**record, "key": "k2"})
    manifest = Manifest(path)
    assert manifest.last("k1") is not None
    assert manifest.last("k2") is not None
