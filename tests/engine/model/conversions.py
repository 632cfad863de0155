"""Conversions of small checkpoints, whole and interrupted."""

from tq.engine.events import Progress
from tq.engine.model.convert import convert
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.sources import open_source

OPTIONS = {"bits": 3, "mlp_bits": "ternary"}


def plan_of(folder, *, dtype=None, format="tq", **options):
    return make_plan(open_source(str(folder)), Recipe.from_options(**options or OPTIONS), dtype=dtype, format=format)


def run(folder, out, *, restart=False, **options):
    """Converts to the end and returns the events."""
    return list(convert(plan_of(folder, **options), out, restart=restart))


def stop(folder, out, n_tensors, **options):
    """Converts and stops after ``n_tensors``, as Ctrl-C between two tensors does."""
    events = convert(plan_of(folder, **options), out)
    for event in events:
        if isinstance(event, Progress):
            if n_tensors == 0:
                break
            n_tensors -= 1
    events.close()
    assert not out.exists()


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def n_tensors(folder):
    return len(plan_of(folder).tensors)
