import pytest
from pydantic import ValidationError

from service.commands import OpenSession, Source, SubmitJob, complaint


def refused(command, **fields):
    with pytest.raises(ValidationError) as told:
        command.model_validate(fields)
    return complaint(told.value)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("voice.wav", "path"),
        ("/srv/a b/voice.wav", "path"),
        ("https://example.org/v.wav", "url"),
        ("file:///etc/passwd", "url"),
        ("data:audio/wav;base64,UklGRg==", "data"),
    ],
)
def test_a_plain_text_says_by_its_beginning_what_it_is(text, field):
    assert Source.model_validate(text).model_dump(exclude_none=True) == {field: text}


def test_a_source_is_one_thing():
    assert refused(Source) == "give one of path, url, data, upload"
    assert refused(Source, path="a", url="http://b") == "give one of path, url, data, upload"


def test_a_job_says_one_thing_once():
    assert SubmitJob.model_validate({"text": "hello"}).priority == "interactive"
    assert refused(SubmitJob) == "give audio or text, one of them"
    assert refused(SubmitJob, audio="a.wav", text="b") == "give audio or text, one of them"
    assert refused(SubmitJob, text="  \n") == "text: is empty"


@pytest.mark.parametrize("identity", ["", ".", "../x", "a/b", "a#", "+", "a b", "-x", "x" * 129, "ä", "a\n"])
def test_a_name_that_would_not_do_in_a_topic_or_a_path_is_refused(identity):
    assert refused(SubmitJob, id=identity, text="hello").startswith("id: ")


def test_what_is_not_known_is_refused_without_its_value():
    told = refused(OpenSession, outputs=["rtmp://host/live/secret"], colour="secret")
    assert told.startswith("colour: ")
    assert "secret" not in told
    assert "secret" not in refused(OpenSession, seed="secret")
