"""Files with the certificates of authorities that the person named, looked at before anybody connects."""

from pathlib import Path

from wmtp_worker.errors import SettingsError


def check_certificates(path: str, variable: str) -> None:
    """Raise `SettingsError` unless `path`, which `variable` names, is a file that can be read and has certificates.

    Unnoticed, it would look like trouble with the network, at each connection anew.
    """
    # to load them all would take longer than to open a store
    why = None
    try:
        if b"CERTIFICATE-----" not in Path(path).read_bytes():
            why = "holds no certificates in PEM format"
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    if why is not None:
        fix = f"set {variable} to a file of certificates that the worker's user can read, or unset it"
        raise SettingsError(f"the file {path} {why}", where=variable, fix=fix)
