"""`python -m ddo_jax.push RUN owner/name [--private]`: a run's weights, card and report to the hub.

RUN is a workdir. What goes there: params.safetensors, config.json, README.md (the card) and samples.png of its best/,
classes.json where there are classes, and report.html. `hf auth login` or $HF_TOKEN say who you are, $HF_ENDPOINT which
hub. Needs `pip install 'ddo_jax[hub]'`. Afterwards hf://owner/name/params.safetensors is a WHAT.
"""

import argparse
import contextlib
import importlib.util
import re

from etils import epath

from ddo_jax import cli, files
from ddo_jax.errors import UserError, one_line
from ddo_jax.files import Damaged

NEEDED = ("params.safetensors", "config.json", "README.md")
REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
UNKNOWN = "license: unknown"


def push_to_hub(
    run: epath.PathLike, repo: str, *, private: bool = False, licence: str | None = None, token: str | None = None
) -> str:
    """Put a run's best/ into a model repository of the hub, in one commit; the repository is made where there is none.

    Args:
      run: a workdir of a finished run. repo: "owner/name". private: of a repository that is made now.
      licence: SPDX identifier; only where the card knows none, for what weights were made from decides.
      token: of the hub; None: the one you logged in with.

    Returns:
      The address of the commit.

    Raises:
      UserError: no finished run, not as it was written, a name or licence that cannot be, or what the hub answers.
    """
    if not REPO.fullmatch(repo):
        raise UserError(f"{repo!r}: no name of a repository; written owner/name")
    contents = collect(epath.Path(run).expanduser(), licence)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("push needs huggingface_hub: pip install 'ddo_jax[hub]'")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="ddo_jax")
    try:
        with contextlib.ExitStack() as stack:
            opened = {
                name: source if isinstance(source, bytes) else stack.enter_context(source.open("rb"))
                for name, source in contents.items()
            }
            api.create_repo(repo, private=private, exist_ok=True)
            operations = [CommitOperationAdd(name, source) for name, source in opened.items()]
            done = api.create_commit(repo, operations, commit_message="Weights, card and report of a run of ddo_jax")
    except Exception as e:  # of the hub's library and of its HTTP client of the day
        raise UserError(f"{repo}: the hub refused ({one_line(e)}); check the token, the name and the network") from None
    return str(done.commit_url)


def collect(run: epath.Path, licence: str | None) -> dict[str, epath.Path | bytes]:
    """{name in the repository: file, or the card's bytes}.

    Raises:
      UserError: see `push_to_hub`.
    """
    best = run / "best"
    if missing := [name for name in NEEDED if not (best / name).exists()]:
        raise UserError(
            f"{run}: no finished run with a card (no best/{missing[0]}); the command that made it completes it"
        )
    try:
        digests = (files.read_sealed(best / "result.json") or {}).get("files", {})
    except Damaged as e:
        raise UserError(f"{e}; start the run once more: it makes best/ again") from None
    for name, digest in digests.items():
        if files.digest(best / name) != digest:
            raise UserError(f"{best / name}: not as it was written; start the run once more: it makes best/ again")
    text = (best / "README.md").read_text()
    if licence is not None and UNKNOWN not in text:
        raise UserError(
            f"--licence={licence}: the card has the licence of the weights that these were made from; leave it out"
        )
    found = {name: best / name for name in (*NEEDED, "samples.png", "classes.json") if (best / name).exists()}
    found |= {"report.html": run / "report" / "report.html"} if (run / "report" / "report.html").exists() else {}
    return found | ({"README.md": text.replace(UNKNOWN, f"license: {licence}", 1).encode()} if licence else {})


def parser() -> cli.Parser:
    p = cli.Parser(prog="python -m ddo_jax.push", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("run", metavar="DIR", help="workdir of a finished run")
    p.add_argument("repo", metavar="OWNER/NAME", help="of the hub; made where it is not there")
    p.add_argument("--private", action="store_true", help="a repository that is made now is seen by you alone")
    p.add_argument("--licence", metavar="ID", help="SPDX identifier, as apache-2.0; only where the card knows none")
    return p


def run(args: argparse.Namespace) -> None:
    print(push_to_hub(args.run, args.repo, private=args.private, licence=args.licence))


def main(argv: list[str] | None = None) -> None:
    cli.main(parser(), run, argv)


if __name__ == "__main__":
    main()
