"""Settings: strict, and what is wrong is said with its place and with what may have been meant."""

from __future__ import annotations

import tomllib
from importlib import resources
from pathlib import Path

import pytest
import yaml

from service import VERSION
from service.config import ConfigError, Settings, load_settings, reference_yaml
from streaming.encoder import EncoderSettings

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "own.yaml"
        path.write_text(text)
        return path

    return write


def test_the_reference_lists_every_setting_with_its_default_and_meaning():
    text = resources.files("configs").joinpath("reference.yaml").read_text("utf-8")
    assert text.split("\n\n", 1)[1] == reference_yaml()
    assert load_settings(ROOT / "configs" / "reference.yaml") == Settings()
    for _, section in Settings():
        for name, field in type(section).model_fields.items():
            assert field.description, name


def test_the_encoders_defaults_are_those_of_the_settings():
    assert EncoderSettings(**Settings().encoder.model_dump()) == EncoderSettings()


def test_the_version_is_that_of_the_distribution():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


def test_what_is_shown_can_be_read_back(file):
    settings = load_settings(None, ["encoder.crf=20", "model.options={merge_last_step: true}", "model.prompt=a: b"])
    assert load_settings(file(reference_yaml(settings))) == settings


def test_the_command_line_is_stronger_than_the_file_and_the_file_than_the_default(file):
    path = file("model: {seed: 1, steps: 2}\nencoder:\n  crf: 20\n")
    settings = load_settings(path, ["encoder.crf=21", "model.seed=2"], model__seed=3, model__prompt=None)
    assert (settings.model.seed, settings.model.steps, settings.encoder.crf) == (3, 2, 21)
    assert settings.encoder.preset == "veryfast"


@pytest.mark.parametrize("text", ["", "# nothing\n", "encoder:\n", "encoder: {}\n"])
def test_an_empty_file_or_section_is_the_defaults(file, text):
    assert load_settings(file(text)) == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "encoder:\n  crf: 20\n  presett: fast\n",
            "own.yaml:3: encoder.presett: unknown setting; did you mean encoder.preset?",
        ),
        ("encodr:\n  crf: 20\n", "own.yaml:1: encodr: unknown setting; did you mean encoder?"),
        ("encoder:\n  colour: red\n", "own.yaml:2: encoder.colour: unknown setting; avatard config show lists all"),
        ("encoder:\n  crf: high\n", "own.yaml:2: encoder.crf: input should be a valid number"),
        ("encoder:\n  crf: 52\n", "own.yaml:2: encoder.crf: input should be less than or equal to 51, not 52"),
        ("encoder:\n  - crf\n", "own.yaml:1: encoder: is a section and holds settings, not ['crf']"),
        ("encoder:\n  crf: 1\n  crf: 2\n", "own.yaml:3: encoder.crf: stands here for the second time"),
        ("- encoder\n", "own.yaml: holds a list, not sections with settings"),
        ("encoder: [\n", "own.yaml:2: is not YAML"),
        ("model:\n  width: 512\n", "model.width and model.height: give both or neither"),
        ("model:\n  seed: -1\n", "own.yaml:2: model.seed: input should be greater than or equal to 0"),
        (
            "limits:\n  picture_megapixels: .inf\n",
            "own.yaml:2: limits.picture_megapixels: input should be a finite number",
        ),
        ("limits:\n  audio_hours: .nan\n", "own.yaml:2: limits.audio_hours: input should be a finite number"),
        ("model:\n  seed: 2001-99-99\n", "own.yaml:2: model.seed: input should be a valid integer"),
        ("model:\n  seed: !!int x\n", "own.yaml: is not YAML that can be read (invalid literal for int()"),
        ("model:\n  seed: !!int ''\n", "own.yaml: is not YAML that can be read ("),
        ("model: &m\n  options: *m\n", "own.yaml: is nested deeper than 32 levels, or holds itself"),
        ("model:\n  options:\n    a: &a [*a]\n", "own.yaml: is nested deeper than 32 levels, or holds itself"),
        ("[" * 5000, "own.yaml: is nested deeper than 32 levels, or holds itself"),
        ("model:\n  options:\n    a: !!binary aGk=\n", "own.yaml:3: model.options.a: input was not a valid JSON value"),
        ("model:\n  options: !!python/object/apply:os.system [ls]\n", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(file, text, message):
    with pytest.raises(ConfigError) as caught:
        load_settings(file(text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encoder.cfr=9", "--set encoder.cfr=9: unknown setting; did you mean encoder.crf?"),
        ("crf=9", "--set crf=9: unknown setting; did you mean encoder.crf?"),
        ("modle.seed=9", "--set modle.seed=9: unknown setting; did you mean model.seed?"),
        ("nothing.like.it=9", "--set nothing.like.it=9: unknown setting; avatard config show lists all"),
        ("encoder.crf", "--set encoder.crf: not of the form section.key=value"),
        ("encoder=9", "--set encoder=9: encoder: is a section and holds settings, not 9"),
        ("model.seed=2001-99-99", "--set model.seed=2001-99-99: model.seed: input should be a valid integer"),
        ("model.seed=!!int ''", "--set model.seed=!!int '': model.seed: input should be a valid integer"),
        (
            "limits.audio_hours=.inf",
            "--set limits.audio_hours=.inf: limits.audio_hours: input should be a finite number",
        ),
        (
            "model.options=&o {a: *o}",
            "--set model.options=&o {a: *o}: is nested deeper than 32 levels, or holds itself",
        ),
        ("model.options=" + "[" * 5000, "[[[[: is nested deeper than 32 levels, or holds itself"),
        ("model.options" + ".a" * 5000 + "=1", ".a.a.: is nested deeper than 32 levels, or holds itself"),
        ("http.host=a..b", "--set http.host=a..b: http.host: is no name or address of a machine, not 'a..b'"),
        ("http.tls_key=x", "--set http.tls_key=x: http.tls_key: needs http.tls_cert, the certificate that it is of"),
        ("encoder.crf.more=9", "encoder.crf.more: input should be a valid number"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_said_with_its_text(text, message):
    with pytest.raises(ConfigError) as caught:
        load_settings(None, [text])
    assert message in str(caught.value)


def test_what_looks_like_a_date_is_a_text(file):
    assert load_settings(file("model:\n  prompt: 2001-99-99\n")).model.prompt == "2001-99-99"


def test_a_file_that_is_not_text_is_one_line(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        load_settings(tmp_path / "own.yaml")


def test_the_reference_is_plain_yaml():
    assert set(yaml.safe_load(reference_yaml())) == set(Settings.model_fields)
