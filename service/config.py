"""Settings: one strict schema, its defaults, and where a value that is wrong was written.

A value is looked for on the command line, then in the file given by --config, then here. configs/reference.yaml lists
every setting; `reference_yaml` writes it, and a test keeps the two equal.
"""

from __future__ import annotations

import difflib
import os
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import PydanticCustomError

from audio.errors import AvatardError

DEEPEST = 32
"""Levels of lists and mappings in a value; a list that holds itself has more than any number."""


class _Loader(yaml.SafeLoader):
    """YAML as people mean it here: no setting is a date, so that 2001-99-99 is a text and not a wrong one."""

    yaml_implicit_resolvers: typing.ClassVar[Any] = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class ConfigError(AvatardError):
    """A setting that is not there or cannot have that value: where it was written, and what would do."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    on_hangup: typing.ClassVar[bool] = False
    """Whether a running daemon takes new values at a SIGHUP; the others wait for its next start."""


def _host(name: str) -> str:
    try:
        name.encode("idna")
    except UnicodeError:
        raise PydanticCustomError("host", "is no name or address of a machine") from None
    return name


Host = typing.Annotated[str, AfterValidator(_host)]
"""What the system can be asked for: of others, such as a..b, its resolver makes a bug."""


class ModelSection(_Section):
    """Which model speaks, and how."""

    name: str = Field("pocket", description="pocket, live-avatar-14b, a folder of weights, or FILE.py:FUNCTION")
    width: int | None = Field(None, ge=64, le=4096, description="pixels; null: the model's own")
    height: int | None = Field(None, ge=64, le=4096, description="pixels; null: the model's own")
    steps: int | None = Field(None, ge=1, le=8, description="denoising steps; null: the model's own")
    prompt: str = Field("", description="what the person does; pocket does not read it")
    seed: int = Field(0, ge=0, lt=2**63, description="the same seed gives the same video")
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="the family's own options, see docs/models.md"
    )
    load_timeout_s: float = Field(1800.0, gt=0, description="seconds until a model that is not loaded is given up")
    step_timeout_s: float = Field(300.0, gt=0, description="seconds until a block that is not made is given up")


class EncoderSection(_Section):
    """How picture and sound are compressed."""

    preset: typing.Literal[
        "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"
    ] = Field("veryfast", description="of x264; slower makes smaller files")
    crf: float = Field(18.0, ge=0, le=51, description="constant rate factor of x264; lower is better and larger")
    keyframe_interval_s: float = Field(2.0, gt=0, le=60, description="seconds from keyframe to keyframe")
    audio_kbps: int = Field(80, ge=16, le=256, description="AAC bit rate in kbit/s for each channel")
    threads: int = Field(1, ge=1, le=64, description="threads of x264; one leaves the other cores to the model")


class LiveSection(_Section):
    """What a broadcast does otherwise than a file."""

    bitrate_kbps: int = Field(2500, ge=100, le=100_000, description="of the picture, where it is sent over a network")
    codec: typing.Literal["libx264", "h264_nvenc"] = Field(
        "libx264", description="h264_nvenc where the GPU has it; libx264 where it has not"
    )
    width: int | None = Field(None, ge=64, le=7680, description="pixels that are sent; null: the model's own")
    height: int | None = Field(None, ge=64, le=4320, description="pixels that are sent; null: the model's own")
    fps: int | None = Field(None, ge=10, le=60, description="frames that are sent each second; null: the model's own")
    channels: int = Field(2, ge=1, le=2, description="of the sound that is sent; some servers want stereo")
    waiting_s: float = Field(
        60.0, ge=1, le=3600, description="seconds of sound that may wait to be spoken before its sender has to"
    )
    file_lead_s: float = Field(
        2.0, ge=0, le=30, description="seconds by which a file is made ahead; a voice is never made ahead"
    )
    step_timeout_s: float = Field(10.0, gt=0, description="seconds until a block that is not made ends the engine")
    snapshot_every_s: float = Field(
        1.0, gt=0, description="seconds of video between snapshots, from which a session goes on after its engine died"
    )


class LimitsSection(_Section):
    """What is refused as too large."""

    on_hangup = True

    audio_hours: float = Field(24.0, gt=0, le=100_000, description="hours of sound in one file")
    picture_megapixels: float = Field(80.0, gt=0, le=10_000, description="millions of pixels in one picture")


class DaemonSection(_Section):
    """The daemon (avatard serve): where it keeps what it must not lose."""

    state: Path = Field(Path("~/.local/state/avatard"), description="folder of jobs, spool and work in progress")
    outputs: Path = Field(Path("~/avatard"), description="folder of results; nothing is ever written outside of it")
    image: Path | None = Field(None, description="picture for whoever names none; null: the bundled presenter")
    metadata_name: str = Field("avatard", min_length=1, max_length=64, description="how this daemon calls itself")
    shutdown_s: float = Field(8.0, gt=0, le=300, description="seconds until what still runs at the end is cut off")


class InputsSection(_Section):
    """What a job or a session may refer to, from outside."""

    on_hangup = True

    roots: tuple[Path, ...] = Field((), description="folders whose files may be named as path; none: no paths")
    urls: bool = Field(True, description="whether http and https addresses are fetched")
    private_addresses: bool = Field(False, description="whether addresses inside private networks are fetched")
    max_mb: float = Field(200.0, gt=0, description="of one picture or sound, in millions of bytes")
    fetch_s: float = Field(30.0, gt=0, le=3600, description="seconds until a fetch is given up")
    spool_hours: float = Field(24.0, gt=0, description="until an upload that no job needs is deleted")
    spool_gb: float = Field(20.0, gt=0, description="of what was brought from outside, in thousands of megabytes")


class JobsSection(_Section):
    """Durable jobs: a picture and a sound in, a file out."""

    on_hangup = True

    queue: int = Field(10_000, ge=1, description="jobs that may wait; more are refused")
    attempts: int = Field(3, ge=1, le=100, description="times a job may be cut off in a row without getting further")
    segment_s: float = Field(12.0, ge=1, le=600, description="seconds of video between two points to resume from")
    keep_days: float = Field(7.0, gt=0, description="until a finished job and its file are deleted")
    keep_gb: float = Field(50.0, gt=0, description="of results in thousands of megabytes; the oldest go first")
    min_free_gb: float = Field(2.0, ge=0, description="of the disk; with less, no job is taken")


class SessionsSection(_Section):
    """Live sessions of the daemon."""

    on_hangup = True

    limit: int = Field(2, ge=1, le=64, description="on air at once")
    idle_s: float = Field(900.0, gt=0, description="seconds without sound, viewer or output until one is closed")
    viewers: int = Field(8, ge=0, le=1000, description="who may watch one session at once")
    targets: tuple[str, ...] = Field(
        ("rtmp", "rtmps", "srt", "hls", "file"), description="kinds of output that may be asked for from outside"
    )
    private_targets: bool = Field(False, description="whether a stream may be sent into private networks")
    jobs_beside_live: typing.Literal["slack", "wait"] = Field(
        "slack", description="jobs work while a live session leaves time, or wait until there is none"
    )


class VoiceSection(_Section):
    """Text to speech, for whoever sends text in place of sound."""

    url: str = Field("", description="of an OpenAI-compatible /v1/audio/speech; empty: espeak-ng where it is installed")
    model: str = Field("tts-1", description="as that service calls it")
    voice: str = Field("", description="as that service, or espeak-ng, calls it; empty: its default")
    key_file: Path | None = Field(None, description="file with that service's key")
    key_env: str = Field("", description="environment variable with that service's key")
    timeout_s: float = Field(20.0, gt=0, description="seconds of silence from that service until it is given up")
    max_characters: int = Field(5000, ge=1, description="of one text")


class HttpSection(_Section):
    """The HTTP server and the page."""

    enabled: bool = Field(True, description="whether there is one")
    host: Host = Field("127.0.0.1", description="address it listens on; any but loopback needs a token in auth")
    port: int = Field(8000, ge=0, le=65535, description="0: one that is free")
    page: bool = Field(True, description="whether / shows the page")
    public_url: str = Field("", description="how others reach it, for addresses of results; empty: http://host:port")
    max_body_mb: float = Field(200.0, gt=0, description="of one upload, in millions of bytes")
    max_json_mb: float = Field(16.0, gt=0, description="of any other request, in millions of bytes")
    connections: int = Field(200, ge=1, description="at once; more are refused")
    tls_cert: Path | None = Field(None, description="file with the certificate chain; null: no TLS")
    tls_key: Path | None = Field(None, description="file with its key")


class MqttSection(_Section):
    """The MQTT client."""

    enabled: bool = Field(False, description="whether there is one")
    host: Host = Field("127.0.0.1", description="of the broker")
    port: int = Field(1883, ge=1, le=65535, description="of the broker; 8883 is usual with TLS")
    version: typing.Literal["5", "3.1.1"] = Field("5", description="of the protocol")
    prefix: str = Field("avatar", pattern=r"^[^#+$\s]+$", description="of every topic")
    group: str = Field("avatard", pattern=r"^[^#+/\s]*$", description="daemons that share jobs; empty: no sharing")
    client_id: str = Field("", description="empty: one made once and kept in daemon.state")
    user: str = Field("", description="for the broker")
    password_file: Path | None = Field(None, description="file with the password")
    password_env: str = Field("", description="environment variable with the password")
    tls: bool = Field(False, description="whether the connection is encrypted")
    ca_file: Path | None = Field(None, description="certificates to trust; null: the system's")
    cert_file: Path | None = Field(None, description="client certificate")
    key_file: Path | None = Field(None, description="its key")
    keepalive_s: int = Field(
        5,
        ge=2,
        le=3600,
        description="seconds; a dead daemon is known after 1.5 times that, a silent broker after twice",
    )
    session_expiry_s: int = Field(
        86_400, ge=0, le=2**32 - 1, description="seconds for which the broker keeps messages for a daemon that is away"
    )
    max_payload_mb: float = Field(32.0, gt=0, description="of one message, in millions of bytes")
    result: typing.Literal["path", "url", "payload"] = Field("url", description="how a result is told by default")
    stats_s: float = Field(60.0, gt=0, description="seconds from one message on stats to the next")


class TokenSection(_Section):
    """One bearer token. Its text stands in a file or an environment variable, never in the settings."""

    name: str = Field(..., min_length=1, max_length=64, description="who holds it, for logs")
    scopes: tuple[typing.Literal["read", "jobs", "live", "admin"], ...] = Field(..., description="what it may do")
    file: Path | None = Field(None, description="file with the token")
    env: str = Field("", description="environment variable with the token")


class AuthSection(_Section):
    """Who may do what over HTTP."""

    on_hangup = True

    tokens: tuple[TokenSection, ...] = Field(
        (),
        description="each name, scopes (read, jobs, live, admin), and file or env; none: loopback only, no token asked",
    )
    requests_per_minute: int = Field(600, ge=1, description="for each token, or each address where there are none")
    failures_per_minute: int = Field(20, ge=1, description="wrong tokens from one address until it has to wait")


class LoggingSection(_Section):
    """What the daemon writes about itself."""

    on_hangup = True

    level: typing.Literal["debug", "info", "warning", "error"] = Field("info", description="what is left out below it")
    format: typing.Literal["text", "json"] = Field("text", description="json: one object a line")


class PathsSection(_Section):
    """Where things lie."""

    models: Path = Field(Path("~/.cache/avatard/models"), description="folder of downloaded models (avatard fetch)")


class Settings(_Section):
    """Every setting there is."""

    model: ModelSection = ModelSection.model_construct()
    encoder: EncoderSection = EncoderSection.model_construct()
    live: LiveSection = LiveSection.model_construct()
    limits: LimitsSection = LimitsSection.model_construct()
    paths: PathsSection = PathsSection.model_construct()
    daemon: DaemonSection = DaemonSection.model_construct()
    inputs: InputsSection = InputsSection.model_construct()
    jobs: JobsSection = JobsSection.model_construct()
    sessions: SessionsSection = SessionsSection.model_construct()
    voice: VoiceSection = VoiceSection.model_construct()
    http: HttpSection = HttpSection.model_construct()
    mqtt: MqttSection = MqttSection.model_construct()
    auth: AuthSection = AuthSection.model_construct()
    logging: LoggingSection = LoggingSection.model_construct()


def load_settings(file: Path | None = None, assignments: Iterable[str] = (), **overrides: Any) -> Settings:
    """The settings of a file and of `section.key=value` texts, the later the stronger.

    overrides: dotted keys with "__" for the dot, from options of the command line; None means not given.
    Raises: ConfigError: names file and line, or the text, and suggests what may have been meant.
    """
    tree: dict[str, Any] = {}
    places: dict[str, str] = {}
    if file is not None:
        tree, places = _read(file)
        _validate(tree, places)
    for key, value, place in [*_assignments(assignments), *_given(overrides)]:
        _assign(tree, key, value)
        places[key] = place
    settings = _validate(tree, places)
    if (settings.model.width is None) != (settings.model.height is None):
        raise ConfigError("model.width and model.height: give both or neither")
    if settings.http.tls_key is not None and settings.http.tls_cert is None:
        place = places.get("http.tls_key", "")
        raise ConfigError(f"{place and f'{place}: '}http.tls_key: needs http.tls_cert, the certificate that it is of")
    return settings


def reloaded(now: Settings, wanted: Settings) -> tuple[Settings, list[str]]:
    """What a running daemon goes on with, and which settings that differ have to wait for its next start."""
    taken = {name: section for name, section in wanted if type(section).on_hangup}
    waiting = [
        f"{name}.{key}"
        for name, section in wanted
        if name not in taken
        for key, value in section
        if value != getattr(getattr(now, name), key)
    ]
    return now.model_copy(update=taken), waiting


def reference_yaml(settings: Settings | None = None, comments: bool = True) -> str:
    """Every setting with its value, as YAML; with what it means as a comment."""
    settings = settings or Settings()
    lines: list[str] = []
    for name, section in settings:
        if comments:
            again = " A daemon reads them again on SIGHUP." if type(section).on_hangup else ""
            lines += ["", f"# {type(section).__doc__}{again}"]
        lines.append(f"{name}:")
        for key, value in section:
            field = type(section).model_fields[key]
            # A settings file is read by people: one line for each setting, whatever its type.
            written = yaml.safe_dump(_plain(value), default_flow_style=True).replace("\n...", "").strip()
            lines.append(f"  {key}: {written}" + (f"  # {field.description}{_range(field)}" if comments else ""))
    return "\n".join(lines).strip() + "\n"


def _plain(value: Any) -> Any:
    """A value as YAML knows it."""
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _range(field: Any) -> str:
    """The limits of a number, in words."""
    words = {"Ge": "at least", "Gt": "more than", "Le": "at most", "Lt": "less than"}
    found = []
    for limit in field.metadata:
        name = type(limit).__name__
        if name in words:
            found.append(f"{words[name]} {getattr(limit, name.lower())}")
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
    return "".join(f"; {part}" for part in [", ".join(found), ", ".join(choices)] if part)


def _read(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The tree in a YAML file, and file:line of every key in it."""
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        tree = _parsed(text)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({(error.strerror or str(error)).lower()})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not text in UTF-8; settings are YAML, see avatard config show") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{line}: is not YAML ({getattr(error, 'problem', None) or error})") from error
    except (_TooDeep, RecursionError) as error:
        raise ConfigError(f"{file}: {_TooDeep.words}") from error
    except Exception as error:
        # What YAML's own constructors raise: of !!int x a ValueError, of !!int "" an IndexError.
        raise ConfigError(f"{file}: is not YAML that can be read ({error})") from error
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: holds a {type(tree).__name__}, not sections with settings; see avatard config show")
    assert node is not None
    return tree, dict(_lines(node, file))


class _TooDeep(Exception):
    words = f"is nested deeper than {DEEPEST} levels, or holds itself"


def _parsed(text: str) -> Any:
    """Raises: yaml.YAMLError; _TooDeep, RecursionError; what else its constructors raise."""
    value = yaml.load(text, Loader=_Loader)
    if _height(value, {}) > DEEPEST:
        raise _TooDeep
    return value


def _height(value: Any, known: dict[int, int]) -> int:
    """Levels of lists and mappings in a value."""
    if not isinstance(value, dict | list):
        return 0
    if id(value) not in known:
        known[id(value)] = DEEPEST  # met again while it is looked into, it holds itself
        below = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + max((_height(part, known) for part in below), default=0)
    return known[id(value)]


def _lines(node: yaml.Node, file: Path, above: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = f"{above}{key.value}"
            place = f"{file}:{key.start_mark.line + 1}"
            if name in seen:
                raise ConfigError(f"{place}: {name}: stands here for the second time; remove one")
            seen.add(name)
            yield name, place
            yield from _lines(value, file, f"{name}.")


def _assignments(texts: Iterable[str]) -> Iterator[tuple[str, Any, str]]:
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {text}: not of the form section.key=value, such as encoder.crf=20")
        try:
            if key.count(".") > DEEPEST:
                raise _TooDeep
            # A text is taken as it stands: a prompt may hold a colon.
            parsed = value if _is_text(key.strip()) else _parsed(value)
        except (_TooDeep, RecursionError) as error:
            raise ConfigError(f"--set {text[:60]}: {_TooDeep.words}") from error
        except Exception:  # it is not YAML, or its constructors say so in their own ways: then it is a text
            parsed = value
        yield key.strip(), parsed, f"--set {text}"


def _is_text(key: str) -> bool:
    section, _, name = key.partition(".")
    fields = type(getattr(Settings(), section, None) or Settings()).model_fields
    return name in fields and fields[name].annotation in (str, Path)


def _given(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for name, value in overrides.items():
        if value is not None:
            yield name.replace("__", "."), value, f"--{name.rpartition('__')[2]} {value}"


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            # Let the schema say what is wrong with it.
            below = tree[section] = {}
        tree = below
    tree[last] = value


def _validate(tree: dict[str, Any], places: Mapping[str, str]) -> Settings:
    try:
        # A section that is named and left empty means its defaults.
        return Settings.model_validate({name: {} if value is None else value for name, value in tree.items()})
    except ValidationError as error:
        raise ConfigError(_explain(error.errors()[0], places)) from None


def _explain(error: Any, places: Mapping[str, str]) -> str:
    location = [str(part) for part in error["loc"]]
    key, place = _written(location, places)
    at = f"{place}: " if place else ""
    if error["type"] == "extra_forbidden":
        hint = _suggestion(key)
        # Said in full where the text that holds it does not already say it.
        what = "unknown setting" if place.startswith("--set") else f"{key}: unknown setting"
        return f"{at}{what}" + (f"; did you mean {hint}?" if hint else "; avatard config show lists all")
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"].startswith("model_"):
        message = "is a section and holds settings"
    return f"{at}{key}: {message}, not {error['input']!r}"


def _written(location: list[str], places: Mapping[str, str]) -> tuple[str, str]:
    """The key as the user wrote it, and where: the error's own, one below an unknown section, or the nearest above."""
    key = ".".join(location)
    if key in places:
        return key, places[key]
    for given, place in places.items():
        if given.startswith(f"{key}."):
            return given, place
    for length in range(len(location) - 1, 0, -1):
        above = ".".join(location[:length])
        if above in places:
            return key, places[above]
    return key, ""


def _suggestion(key: str) -> str:
    """The known setting, or section, that is most like an unknown one; empty when none is."""
    known = {section: list(type(settings).model_fields) for section, settings in Settings()}
    section, separator, name = key.rpartition(".")
    if section in known:
        # The section is right: better no answer than a setting that has nothing to do with it.
        close = difflib.get_close_matches(name, known[section], 1, 0.6)
        return f"{section}.{close[0]}" if close else ""
    everywhere = {name: f"{section}.{name}" for section, names in known.items() for name in names}
    close = difflib.get_close_matches(name, everywhere, 1, 0.7)
    if close and (separator or name not in known):
        return everywhere[close[0]]
    return next(iter(difflib.get_close_matches(key, known, 1, 0.6)), "")


def models_folder(settings: Settings) -> Path:
    """Where downloaded models lie, with ~ resolved."""
    return Path(os.path.expanduser(settings.paths.models))
