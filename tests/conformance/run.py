"""PEFT's own tests of LoRA and DoRA on models that `fuse` has made ours, beside the same tests without.

    python tests/conformance/run.py --json results.json --markdown results.md
    python tests/conformance/run.py --peft-tests ../peft test_custom_models.py -k DoRA

Exit status: 0 when no case fails that passes without `fuse`, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

from outcomes import Cases, compare, summary, tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
VERSIONS = ("echolora-kernels", "peft", "torch", "transformers")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="of PEFT's tests; by default all that speak of LoraConfig")
    parser.add_argument(
        "--peft-tests", type=Path, help="a checkout of PEFT, or its tests; else the sdist's of the version here"
    )
    parser.add_argument(
        "--online", action="store_true", help="load models from the hub; else there are stand-ins for some"
    )
    parser.add_argument("--json", type=Path, help="file for the result of every case")
    parser.add_argument("--markdown", type=Path, help="file for the tables")
    parser.add_argument("-k", dest="expression", help="as pytest's")
    chosen = parser.parse_args(arguments)
    tests = peft_tests(chosen.peft_tests)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "tests"  # as some of the tests import each other
        package.mkdir()
        (package / "__init__.py").touch()
        for path in tests.glob("test*.py"):
            shutil.copy(path, package)
        files = chosen.files or files_about_lora(package)
        plain, fused = both_runs(package, files, chosen.expression, chosen.online)
    cases = compare(plain, fused)
    versions = {"Python": platform.python_version()} | {name: version(name) for name in VERSIONS}
    models = "from the hub" if chosen.online else "small random ones in place of those on the hub"
    text = f"{', '.join(f'{name} {number}' for name, number in versions.items())}. Models: {models}.\n\n{tables(cases)}"
    print(text)
    if chosen.markdown:
        chosen.markdown.write_text(text)
    if chosen.json:
        chosen.json.write_text(
            json.dumps({"versions": versions, "models": models, **summary(cases), "cases": cases}, indent=1) + "\n"
        )
    return int(not cases or any(case["outcome"] == "failed" for case in cases.values()))


def peft_tests(given: Path | None) -> Path:
    """The folder of PEFT's tests: in what is given, else in the sdist of the installed version."""
    if given is not None:
        found = next(
            (folder for folder in (given / "tests", given) if (folder / "test_custom_models.py").is_file()), None
        )
        if found is None:
            raise SystemExit(f"--peft-tests: got {given}, wants a checkout of PEFT or the tests in it")
        return found
    release = f"peft-{version('peft')}"
    kept = ROOT / "build" / "conformance"
    if not (kept / release).is_dir():
        kept.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        pip += ["--no-build-isolation", "--no-binary", "peft", "--dest", str(kept), release.replace("-", "==")]
        if subprocess.run(pip).returncode:
            raise SystemExit(f"{release}: its sdist could not be downloaded; give --peft-tests a checkout of PEFT")
        with tarfile.open(kept / f"{release}.tar.gz") as archive:
            archive.extractall(kept, filter="data")
    return kept / release / "tests"


def files_about_lora(package: Path) -> list[str]:
    """Names of the test files in which LoraConfig occurs."""
    return sorted(path.name for path in package.glob("test_*.py") if re.search(r"\bLoraConfig\b", path.read_text()))


def both_runs(package: Path, files: list[str], expression: str | None, online: bool) -> tuple[Cases, Cases]:
    """The records of the plugin from the run without and the run with `fuse`, which go on at the same time."""
    command = [sys.executable, "-m", "pytest", "-p", "peft_plugin", "-c", os.devnull, "--rootdir", str(package.parent)]
    command += [
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
        "--continue-on-collection-errors",
        "-q",
        "--tb=no",
        "-rN",
    ]
    command += [f"tests/{name}" for name in files]
    command += ["-k", expression] if expression else []
    paths = [str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    if not online:
        from stand_ins import make_cache  # loads transformers

        hub = make_cache(package.parent / "hub")
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(hub)}
    records = {name: package.parent / f"{name}.json" for name in ("plain", "fused")}
    runs = [
        subprocess.Popen(
            [*command, "--record", str(record), *(["--fuse-models"] if name == "fused" else [])],
            cwd=package.parent, env=os.environ | environment, stdout=sys.stderr,
        )
        for name, record in records.items()
    ]  # fmt: skip
    ends = [run.wait() for run in runs]
    if not all(record.is_file() for record in records.values()):
        raise SystemExit(f"pytest ended with {ends}; see its messages above")
    plain, fused = (json.loads(record.read_text()) for record in records.values())
    return plain, fused


if __name__ == "__main__":
    sys.exit(main())
