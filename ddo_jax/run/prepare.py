"""From a config and a workdir to a prepared run: what its phases share is built here, once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ddo_jax import compilation, files, hosts, sharding, stores
from ddo_jax import config as configs
from ddo_jax.data import sources
from ddo_jax.families import Family
from ddo_jax.generate.sampler import make_sampler
from ddo_jax.run import checks, fill, jobs, record, reference_scores, scoring, state, step
from ddo_jax.run.profile import Profile
from ddo_jax.store import classes, load
from ddo_jax.store import workdir as workdirs
from ddo_jax.store.checkpoint import weights_digest


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is compiled once a run, when it is first used.

    Attributes:
      images, fakes: samplers (`generate.sampler.make_sampler`) of images to look at, and of records to train on.
      step_for: of `step.step_factory`. ratio: of `step.make_ratio`.
      asks: `reference_scores.Programs`, of exact scores. refer: of `step.make_reference`, where several candidates
        share its answer. Both None: the step asks the reference itself.
      tokens: (frozen, record of pixels) -> record of tokens, where training has to make them; or None.
    """

    images: Callable
    fakes: Callable
    step_for: Callable
    ratio: Callable[..., jax.Array]
    asks: reference_scores.Programs | None
    refer: Callable | None
    tokens: Callable[..., dict] | None


@dataclasses.dataclass(frozen=True)
class Setup:
    """A prepared run.

    Attributes:
      config, workdir, mesh: of the run. family, frozen: of its network.
      data: source of real images. training_data: what training reads: data, or its tokens.
      programs, scorer: see there. init: parameters to start from; None: from scratch. drawn: those of them that were
        drawn anew, for other classes; None where none are adapted. profile: of steps.
    """

    config: Any
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    family: Family
    frozen: Any
    data: sources.Source
    training_data: sources.Source
    programs: Programs
    scorer: scoring.Scorer
    console: record.Console
    init: sharding.Parked | None = None
    drawn: tuple[str, ...] | None = None
    profile: Profile = Profile()


def abstract_params(setup: Setup):
    """Shapes and shardings of the parameters: what a checkpoint is restored onto."""
    return sharding.abstract(setup.mesh, jax.eval_shape(setup.family.init, jax.random.key(0))[0])


def prepare(config, workdir: epath.PathLike, console: record.Console) -> Setup:
    """Check the config, open the workdir, build what the phases share.

    Raises:
      UserError: see `checks.check`, `store.workdir.open_workdir`.
    """
    config, checked = hosts.together(lambda: _checked(config, workdir, console))
    family, mesh, data = checked.family, checked.mesh, checked.data
    params, own, drawn, digest = _start(config, checked, console)
    frozen = load.complete(family, mesh, own)
    inputs = {"data": data.fingerprint, "start": digest}
    inputs |= {name: weights_digest(frozen[name]) for name in frozen if name not in own}
    inputs |= scoring.scoring_inputs(config)
    workdir = workdirs.open_workdir(config, workdir, inputs)
    compilation.share(workdir / "xla")
    if jax.process_index() == 0:
        files.remove_leftovers(workdir, config.lease_s)
    workdirs.check_inputs(workdir, inputs)
    classes.keep(workdir, data, console)
    load.save_frozen(workdir, own)
    samplers = [(how, _sampler(config, family, how, mesh)) for how in _settings(config, checked)]
    training_data, tokens = tokenised(config, family, frozen, mesh, data)
    programs = Programs(
        images=samplers[0][1],
        fakes=_fakes(config, checked, samplers[0][1]),
        step_for=step.step_factory(config, family, mesh),
        ratio=step.make_ratio(family, config.ddo),
        asks=reference_scores.programs(family, config.ddo, mesh) if family.spec.exact else None,
        refer=step.make_reference(family, config.ddo, mesh) if config.ddo.together > 1 else None,
        tokens=tokens,
    )
    scorer = scoring.open_scorer(config, workdir, family, frozen, samplers, data)
    return Setup(
        config=config,
        workdir=workdir,
        mesh=mesh,
        family=family,
        frozen=frozen,
        data=data,
        training_data=training_data,
        programs=programs,
        scorer=scorer,
        console=console,
        init=None if params is None else sharding.Parked(params),
        drawn=drawn,
    )


def _checked(config, workdir: epath.PathLike, console: record.Console) -> tuple[Any, checks.Checked]:
    stores.reach(workdir)
    config = fill.filled(config, workdir, console.line)
    return config, checks.check(config)


def _start(config, checked: checks.Checked, console) -> tuple[Any, Any, tuple[str, ...] | None, str]:
    """(parameters or None: from scratch, frozen, what was drawn anew for other classes, digest of what was given)."""
    family, mesh = checked.family, checked.mesh
    if checked.init is None:
        return None, initial_frozen(family, mesh, config.seed), None, "scratch"
    if not configs.is_set(config.adapt.length):
        params, frozen = load.parameters(checked.init, family, mesh)
        return params, frozen, None, weights_digest(params)
    donor = load.donor(checked.init, family)
    given, frozen = load.parameters(checked.init, donor, mesh)
    fresh = sharding.place(mesh, jax.jit(lambda key: family.init(key)[0])(state.derive(config.seed, "init")))
    params, drawn = load.graft(given, fresh)
    anew = f"drawn anew: {', '.join(drawn)}" if drawn else "nothing is drawn anew"
    console.line(f"adapting {config.init} to {checked.data.name}, {family.spec.num_classes} classes; {anew}")
    return params, frozen, drawn, weights_digest(given)


def initial_frozen(family: Family, mesh, seed: int):
    """Buffers of a network that starts from scratch."""
    return sharding.place(mesh, jax.jit(lambda key: family.init(key)[1])(state.derive(seed, "init")))


def _settings(config, checked: checks.Checked) -> list:
    """The run's own sampler settings, then those of config.eval.also."""
    also = [checked.family.settings({**config.sampler, **given}) for given in config.eval.also]
    return [checked.settings, *also]


def _sampler(config, family: Family, settings, mesh) -> Callable:
    return jobs.reporting(make_sampler(family, settings, mesh, config.eval.batch))


def _fakes(config, checked: checks.Checked, images: Callable) -> Callable:
    """The sampler of fakes: pixels are stored as they are looked at, so one program serves both."""
    family, batch = checked.family, config.eval.batch
    if family.spec.works_on_pixels:
        return images
    how = family.fake_settings(checked.settings)
    batch = (
        batch if config.ddo.pool else min(batch, configs.fakes_of_a_step(config.ddo))
    )  # a step's fakes are not padded
    return jobs.reporting(make_sampler(family, how, checked.mesh, batch, output="records"))


TOKENISED_ONCE = 2**16  # images; of larger sets training makes the tokens of every step


def tokenised(config, family, frozen, mesh, data):
    """(what training reads, the program that makes tokens of its records or None), for families with tokens.

    The tokens of small sets are made here, once, where an image always has the same ones.
    """
    if family.spec.stored.kind != "tokens" or family.spec.kind(data.image_shape) != "pixels":
        return data, None

    @jax.jit
    def tokens(frozen, record):
        return family.store(frozen, family.encode(frozen, record, jax.random.key(0)))

    if config.data.flip or data.random_crop or len(data) > TOKENISED_ONCE:
        return data, tokens
    batch, parts = config.eval.batch, []
    for i in range(0, len(data), batch):
        rows = np.resize(np.arange(i, min(i + batch, len(data))), batch)  # padded: one program
        record = data.read(rows[sharding.own_rows(batch)])
        made = tokens(frozen, sharding.put_batch(mesh, record))
        parts.append({k: sharding.to_host(v)[: len(data) - i] for k, v in made.items()})
    images, labels = (np.concatenate([p[k] for p in parts]) for k in ("image", "label"))
    return sources.ArraySource(data.name, images, labels, data.num_classes), None
