"""Every file of a run gone, empty, halved or with one digit changed, then the same command: `python tests/damage.py`.

`--undecided` takes the run back to the middle of its round first; patterns choose files. Allowed are the same scores,
weights and winner ("equal"), one line ("refused"), and lines missing from evals.jsonl ("other evals").
"""

import argparse
import collections
import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import logging  # noqa: E402

from ddo_jax.data import tree  # noqa: E402
from ddo_jax.errors import UserError  # noqa: E402
from ddo_jax.run import main_job  # noqa: E402
from tests.harness import micro_config  # noqa: E402
from tests.run import test_damage as damages  # noqa: E402


def outcome(config, workdir: Path, wanted) -> str:
    tree.warn.cache_clear()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            main_job.run(config, workdir)
    except UserError as e:
        return "refused" if "\n" not in str(e) else "not one line"
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    found = damages.result(workdir)
    return "equal" if found == wanted else "other evals" if found[:3] == wanted[:3] else "ANOTHER RESULT"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--undecided", action="store_true")
    p.add_argument("patterns", nargs="*")
    args = p.parse_args()
    logging.set_verbosity(logging.FATAL)
    root, config = Path(tempfile.mkdtemp()), micro_config()
    config.keep = "all" if args.undecided else "best"
    main_job.run(config, root / "good")
    wanted, counts = damages.result(root / "good"), collections.Counter()
    names = [str(path.relative_to(root / "good")) for path in sorted((root / "good").rglob("*")) if path.is_file()]
    for name in names:
        if name.endswith(".png") or args.patterns and not any(pattern in name for pattern in args.patterns):
            continue
        for how in ("gone", "empty", "half", "digit"):
            workdir = root / "w"
            shutil.rmtree(workdir, ignore_errors=True)
            shutil.copytree(root / "good", workdir)
            if args.undecided:
                damages.back(workdir)
            if (workdir / name).exists():
                damages.damage(workdir / name, how)
                said = outcome(config, workdir, wanted)
                counts[said if said in ("equal", "refused", "other evals") else "wrong"] += 1
                print(f"{name} {how}: {said}", flush=True)
    shutil.rmtree(root)
    print(*(f"{number} {said}" for said, number in counts.items()), sep=", ")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
