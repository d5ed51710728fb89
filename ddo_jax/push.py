"""`python -m ddo_jax.push RUN owner/name [--private]`: a run's weights, card and report to the hub.

RUN is a workdir. What goes there: params.safetensors, config.json, README.md (the card) and samples.png of its best/,
classes.json where there are classes, and report.html. `hf auth login` or $HF_TOKEN say who you are, $HF_ENDPOINT which
hub. Needs `pip install 'ddo_jax[hub]'`. Afterwards hf://owner/name/params.safetensors is a WHAT. config.json and the
report name data and weights by their paths on this machine: look at them before they are public (--private).
"""

import argparse
import contextlib
import importlib.util
import os
import re
import tempfile

from etils import epath

from ddo_jax import cli, files, stores
from ddo_jax.errors import UserError, one_line
from ddo_jax.files import Damaged
from ddo_jax.report import card

NEEDED = ("params.safetensors", "config.json", "README.md", "result.json")  # the last one says that it is whole
REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
UNKNOWN, LICENCE = re.compile("^license: unknown$", re.MULTILINE), re.compile("[a-z0-9.+-]{2,60}")


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
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UserError(f"--licence={licence!r}: no SPDX identifier; allowed: such as apache-2.0, mit, cc-by-4.0")
    run = epath.Path(run).expanduser()
    stores.reach(run)
    contents = collect(run, licence)
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UserError("push needs huggingface_hub: pip install 'ddo_jax[hub]'")
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="ddo_jax")
    try:
        with contextlib.ExitStack() as stack:
            operations = [CommitOperationAdd(name, _local(source, stack)) for name, source in contents.items()]
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.create_commit(repo, operations, commit_message="Weights, card and report of a run of ddo_jax")
    except Exception as e:  # of the hub's library and of its HTTP client of the day
        raise UserError(f"{repo}: the hub refused ({one_line(e)}); check the token, the name and the network") from None
    return str(done.commit_url)


def _local(source: epath.Path | bytes, stack: contextlib.ExitStack) -> str | bytes:
    """What the hub's library takes: bytes, or a local path; of an object store that of a copy, until the stack ends."""
    if isinstance(source, bytes):
        return source
    if not stores.is_remote(source):
        return os.fspath(source)
    copy = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), source.name)
    source.copy(copy)
    return copy


def collect(run: epath.Path, licence: str | None) -> dict[str, epath.Path | bytes]:
    """{name in the repository: file, or the card's bytes}.

    Raises:
      UserError: see `push_to_hub`.
    """
    best = run / "best"
    if missing := [name for name in NEEDED if not (best / name).exists()]:
        raise UserError(
            f"{run}: no finished run with a card (no best/{missing[0]}); allowed: a workdir whose command has ended "
            "(of an older version: start it again)"
        )
    try:
        digests = (files.read_sealed(best / "result.json") or {}).get("files", {})
    except Damaged as e:
        raise UserError(f"{e}; start the run once more: it makes best/ again") from None
    for name, digest in digests.items():
        if files.digest(best / name) != digest:
            raise UserError(f"{best / name}: not as it was written; start the run once more: it makes best/ again")
    text = (best / "README.md").read_text()
    head, rule, rest = text.removeprefix("---").partition("\n---\n")
    if licence is not None and not UNKNOWN.search(head):
        raise UserError(
            f"--licence={licence}: the card has the licence of the weights that these were made from; leave it out"
        )
    found = {name: best / name for name in (*NEEDED[:-1], "samples.png", "classes.json") if (best / name).exists()}
    found |= {"report.html": run / "report" / "report.html"} if (run / "report" / "report.html").exists() else {}
    if licence is not None:
        head = UNKNOWN.sub(f"license: {licence}", head)
        rest = rest.replace(card.licence_line("unknown"), f"`{licence}`, as their maker states.")
        found["README.md"] = f"---{head}{rule}{rest}".encode()
    return found


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
