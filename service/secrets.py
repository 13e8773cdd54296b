"""Secrets: their text stands in a file or in an environment variable, never in the settings, and is never shown."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from service.config import ConfigError
from service.log import hide

_MOST_BYTES = 65_536


def read_secret(setting: str, file: Path | None, env: str) -> str:
    """The text in a file or an environment variable, without white space around it; empty where neither is named.

    From then on the log blanks it, wherever it turns up.

    setting: what it is for, as errors call it, such as mqtt.password.
    Raises: ConfigError: both are named; missing, empty, more than one line, or a file that everybody may read.
    """
    if file is not None and env:
        raise ConfigError(f"{setting}: give a file or an environment variable, not both")
    if file is not None:
        return _one_line(_text_of(setting, Path(os.path.expanduser(file))), f"{setting}: {file}")
    if not env:
        return ""
    if env not in os.environ:
        raise ConfigError(f"{setting}: there is no environment variable {env}; set it, or name a file instead")
    return _one_line(os.environ[env], f"{setting}: environment variable {env}")


def check_certificate(cert: Path, key: Path | None) -> None:
    """Raises: ConfigError: http.tls_cert, with http.tls_key or the key in it, cannot be served with."""
    import ssl

    where = "http.tls_cert, http.tls_key" if key is not None else "http.tls_cert"
    for file in filter(None, (cert, key)):
        try:
            with open(os.path.expanduser(file), "rb"):
                pass
        except (OSError, ValueError) as error:
            why = (getattr(error, "strerror", None) or str(error)).lower()
            raise ConfigError(f"{where}: {file}: cannot be read ({why})") from error
    try:
        # Without the password it would ask for one on the terminal, and a daemon has none.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            os.path.expanduser(cert), os.path.expanduser(key) if key is not None else None, password=""
        )
    except (OSError, ValueError) as error:  # of ssl's errors each is an OSError
        files = " and ".join(map(str, filter(None, (cert, key))))
        raise ConfigError(
            f"{where}: no certificate with its key is in {files}; both are wanted as PEM, without a password"
        ) from error


def _text_of(setting: str, file: Path) -> str:
    try:
        with file.open("rb") as opened:
            # Asked of what was opened: the name may mean another file by now.
            mode = os.fstat(opened.fileno()).st_mode
            if mode & (stat.S_IROTH | stat.S_IWOTH):
                raise ConfigError(
                    f"{setting}: {file}: everybody on this machine can read or change it; chmod 600 {file}"
                )
            return opened.read(_MOST_BYTES).decode()
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ConfigError(f"{setting}: {file}: cannot be read ({why}); write the secret into it, chmod 600") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting}: {file}: is not text in UTF-8") from error


def _one_line(text: str, where: str) -> str:
    text = text.strip()
    if not text:
        raise ConfigError(f"{where}: is empty; write the secret into it")
    if not text.isprintable():
        raise ConfigError(f"{where}: holds more than one line, or something that cannot be printed")
    hide(text)
    return text
