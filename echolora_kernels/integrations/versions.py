"""The versions of other libraries whose inner parts are read here."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

# pyproject.toml states the same
SUPPORTED = {"peft": ">=0.19,<0.22"}


def want_supported(library: str) -> None:
    """Raise unless the installed version of `library` is one that its integration knows.

    Raises:
        ImportError: it is not; the message says what to install.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version  # which every library here brings

    wanted = SUPPORTED[library]
    advice = f"wants {wanted}; pip install '{library}{wanted}'"
    try:
        found = version(library)
    except PackageNotFoundError as error:
        raise ImportError(f"{library}: is not installed, {advice}", name=library) from error
    if not SpecifierSet(wanted).contains(Version(found), prereleases=True):
        raise ImportError(f"{library}: got {found}, {advice}", name=library)
